"""What choosing keys by a sketch takes, beside attention to all of them.

    python benchmarks/sparse_speed.py [MODEL.gguf] [--context 32768] [--sparse topk:1024]
        [--weights packed] [--rounds 15]

Attention of one token in 28 layers of 12 query and 2 kv heads of 128 (those of Qwen2.5-Coder-1.5B),
in bfloat16, on caches of their own, so that they stream from memory: all keys, the choice, and the
choice with attention to what it chose. The same for latents of 512 + 64 with 16 and 128 heads,
which `attach` refuses. With a model: its whole step, on caches of random keys, and what is left of
it without that of a step on a cache of few tokens. All in turn in one process; medians and
quartiles, and the bytes that are read.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from report import environment

import headwise
from headwise import latent_attention
from headwise.caches import ContiguousCache, Sketch
from headwise.hf import read_nbytes, use_own_layers
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.measure import Timing, interleaved, ratio
from headwise.ops import Budget, add_rest, choose_keys, means_of, row_bytes
from headwise.spec import SparseChoice

_FEW = "64 tokens"
LAYERS, HEADS, KV_HEADS, DIM, RANK, ROPE = 28, 12, 2, 128, 512, 64


def shown(timing: Timing, parts: int = 1) -> str:
    """The median, and the quartiles, of each of some parts."""
    low, high = (1e3 * each / parts for each in timing.quartiles)
    return f"{1e3 * timing.median / parts:.3g} ms ({low:.3g}-{high:.3g})"


def compare(runs: dict[str, Callable[[], Any]], rounds: int, parts: int = 1) -> dict[str, Timing]:
    """Time some calls in turn; the first is what the others are compared with."""
    timings = interleaved(runs, rounds=rounds)
    first = next(iter(runs))
    for name, timing in timings.items():
        times = "" if name == first else f", {ratio(timings[first], timing)}"
        print(f"  {name:<24}{shown(timing, parts)}{times}")
    return timings


def heads(choice: SparseChoice, context: int, rounds: int) -> None:
    """Layers of grouped-query attention."""
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        cache, sketch = ContiguousCache(), Sketch()
        key, value = cache.append(*torch.randn(2, 1, KV_HEADS, context, DIM).bfloat16())
        layers.append((key, value, sketch.view(cache), cache))
    query = torch.randn(1, HEADS, 1, DIM).bfloat16()
    budget, means = Budget.of(choice), means_of(layers[0][1], 1)

    def dense() -> None:
        for key, value, _, _ in layers:
            headwise.attention(query, key, value, causal=True)

    def choice_alone() -> None:
        for _, _, sketch, _ in layers:
            choose_keys(query, sketch, budget)

    def sparse() -> None:
        for key, value, sketch, _ in layers:
            chosen, rest = choose_keys(query, sketch, budget)
            out = headwise.attention(query, key, value, causal=True, indices=chosen)
            add_rest(out, rest, means)

    rows = KV_HEADS * 4 * DIM
    read = KV_HEADS * context * row_bytes(DIM, 4) + rows * choice.most
    print(f"a layer, {context:,} tokens; {rows * context:,} bytes of rows, or {read:,} at most:")
    compare(
        {"all keys": dense, "the choice": choice_alone, "choice and attention": sparse},
        rounds,
        LAYERS,
    )


def latents(choice: SparseChoice, context: int, rounds: int, count: int) -> None:
    """Layers of latent attention with so many heads, absorbed."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        latent, rope = (torch.randn(1, context, dim).bfloat16() for dim in (RANK, ROPE))
        cache, sketch = ContiguousCache(), Sketch()
        rows = torch.cat([latent, rope], dim=-1).unsqueeze(1)
        cache.append(rows, rows[..., :0])
        layers.append((latent, rope, sketch.view(cache)))
    nope, turned = (
        torch.randn(1, count, 1, DIM).bfloat16(),
        torch.randn(1, count, 1, ROPE).bfloat16(),
    )
    up, down = (0.05 * torch.randn(2, count, DIM, RANK)).bfloat16()
    budget = Budget.of(choice)
    options: dict[str, Any] = {"causal": True, "paradigm": "absorbed"}

    def dense() -> None:
        for latent, rope, _ in layers:
            latent_attention(nope, turned, latent, rope, up, down, **options)

    def sparse() -> None:
        for latent, rope, sketch in layers:
            query = torch.cat([torch.einsum("bhsn,hnr->bhsr", nope, up), turned], dim=-1)
            chosen, _ = choose_keys(query, sketch, budget, scale=(DIM + ROPE) ** -0.5)
            latent_attention(nope, turned, latent, rope, up, down, indices=chosen, **options)

    print(f"a layer of latents, {count} heads, {context:,} tokens:")
    compare({"all latents": dense, "choice and attention": sparse}, rounds, len(layers))


def step(arguments: argparse.Namespace) -> None:
    """A whole step of a model."""
    model: Any = headwise.load(arguments.model, dtype="bfloat16", weights=arguments.weights)
    model = model[0] if isinstance(model, tuple) else model
    caches, runs = {}, {}
    kinds = (("all keys", None), (arguments.sparse, arguments.sparse), (_FEW, None))
    for name, sparse in kinds:
        headwise.attach(model, sparse=sparse)
        held = model._headwise
        cache: Any = use_own_layers(DynamicCache(config=model.config), held.choice, held.sparse)
        with torch.no_grad():
            model(torch.arange(64)[None], use_cache=True, **{CACHE: cache})
        generator = torch.Generator().manual_seed(0)
        for layer in cache.layers if name != _FEW else ():
            batch, kv_heads, length, dim = layer.keys.shape
            size = (2, batch, kv_heads, arguments.context - length, dim)
            layer.cache.append(*torch.randn(size, generator=generator).to(model.dtype))
        caches[name] = cache

    def one(cache: Any) -> None:
        with torch.no_grad():
            model(torch.tensor([[5]]), use_cache=True, **{CACHE: cache})

    for name, cache in caches.items():
        began = time.perf_counter()
        one(cache)
        first = time.perf_counter() - began
        runs[name] = lambda cache=cache: one(cache)
        print(f"  {name}: the first step {first:.2f} s; a step reads {read_nbytes(cache):,} bytes")
    print(f"a step of {arguments.model}, weights {arguments.weights}:")
    timings = compare(runs, arguments.rounds)
    pairs = zip(*(timings[name].seconds for name, _ in kinds), strict=True)
    apart = [((dense - few), (sparse - few)) for dense, sparse, few in pairs]
    dense, sparse = (Timing(each) for each in zip(*apart, strict=True))
    print(f"  less the last: {shown(dense)}, {shown(sparse)}, {ratio(dense, sparse)}")


def main() -> None:
    """Print all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--sparse", default="topk:1024")
    parser.add_argument("--weights", default="packed")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(environment())
    choice = SparseChoice.parse(arguments.sparse)
    with torch.inference_mode():
        heads(choice, arguments.context, arguments.rounds)
        for count in (16, 128):
            latents(choice, arguments.context, arguments.rounds, count)
    if arguments.model is not None:
        step(arguments)


if __name__ == "__main__":
    main()
