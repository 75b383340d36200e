"""Attention to the keys that an indexer chooses, beside Transformers' own and beside all keys.

    python benchmarks/indexers.py [--context 32768] [--dtype bfloat16] [--rounds 9]

One layer and one token: DeepSeek-V3.2's latents (R 512, P 64), 64 index heads of 128, the best
2,048 keys; from projected query, latents and index query to the heads' outputs. Then Qwen4's
indexer on a prompt, a module of Transformers with random weights, and the memory that choice and
attention of a prompt take. A and B in turn, in one process; medians and quartiles.
"""

import argparse
import importlib
import resource
import time
from typing import Any

import torch
from report import environment

from headwise import latent_attention
from headwise.hf.indexers.pooled import MeanPoolIndexer
from headwise.measure import Timing, interleaved, ratio
from headwise.ops import index_topk

RANK, ROPE, NOPE, VALUE, INDEX_HEADS, INDEX_DIM, TOP = 512, 64, 128, 128, 64, 128, 2048


def shown(timing: Timing) -> str:
    """The median, and the quartiles."""
    low, high = timing.quartiles
    return f"{1e3 * timing.median:.3g} ms ({1e3 * low:.3g}-{1e3 * high:.3g})"


class Stock:
    """What DeepSeek-V3.2's module of Transformers does between its projections and its heads."""

    def __init__(self, tensors: dict[str, torch.Tensor], top: int) -> None:
        self.tensors, self.top = tensors, top

    def __call__(self) -> torch.Tensor:
        at = self.tensors
        heads, latent = at["w_uk"].shape[0], at["latent"]
        weight = torch.cat([at["w_uk"], at["w_uv"]], dim=1).flatten(0, 1)
        expanded = torch.nn.functional.linear(latent, weight)
        expanded = expanded.view(1, latent.shape[1], heads, -1).transpose(1, 2)
        nope, value = expanded.split([NOPE, VALUE], dim=-1)
        key = torch.cat([nope, at["key_rope"].unsqueeze(1).expand(-1, heads, -1, -1)], dim=-1)
        scores = at["index_query"].float() @ at["index_key"].float().transpose(-1, -2).unsqueeze(1)
        scores = (at["weights"].unsqueeze(-2) @ scores.relu()).squeeze(-2)
        chosen = scores.topk(self.top, dim=-1).indices
        mask = torch.zeros(1, 1, latent.shape[1], dtype=torch.bool).scatter(-1, chosen, True)
        query = torch.cat([at["query_nope"], at["query_rope"]], dim=-1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.unsqueeze(1)
        )


def one_token(heads: int, context: int, dtype: torch.dtype, rounds: int) -> None:
    """A step of one layer: stock, absorbed over all keys, and over the chosen ones."""
    torch.manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size).to(dtype)

    at = {
        "query_nope": random(1, heads, 1, NOPE),
        "query_rope": random(1, heads, 1, ROPE),
        "latent": random(1, context, RANK),
        "key_rope": random(1, context, ROPE),
        "w_uk": random(heads, NOPE, RANK) / RANK**0.5,
        "w_uv": random(heads, VALUE, RANK) / RANK**0.5,
        "index_query": random(1, 1, INDEX_HEADS, INDEX_DIM),
        "index_key": random(1, context, INDEX_DIM),
        "weights": torch.rand(1, 1, INDEX_HEADS),
    }
    attention = [
        at[name] for name in ("query_nope", "query_rope", "latent", "key_rope", "w_uk", "w_uv")
    ]
    index = [at[name] for name in ("index_query", "index_key", "weights")]

    def dense() -> Any:
        return latent_attention(*attention, paradigm="absorbed", causal=True)

    def choose() -> torch.Tensor:
        return index_topk(*index, TOP, causal=True).unsqueeze(1)

    chosen = choose()

    def attend() -> Any:
        return latent_attention(*attention, paradigm="absorbed", causal=True, indices=chosen)

    def sparse() -> Any:
        return latent_attention(*attention, paradigm="absorbed", causal=True, indices=choose())

    stock = Stock(at, TOP)
    expected, given = stock().float(), sparse().float()
    error = float((given - expected).abs().max() / expected.abs().max())
    theirs = interleaved({"stock": stock}, rounds=4, warmup=1)["stock"]
    ours = interleaved(
        {"all": dense, "choice": choose, "attention": attend, "both": sparse}, rounds=rounds
    )
    choice = 2 * context * INDEX_HEADS * INDEX_DIM
    rows = 2 * heads * (2 * RANK + ROPE)
    counted = context * rows / (choice + TOP * rows)
    print(
        f"{heads} heads, {context:,} tokens, {dtype}: stock {shown(theirs)}, absorbed over all "
        f"{shown(ours['all'])}, choice {shown(ours['choice'])} and attention "
        f"{shown(ours['attention'])}, both {shown(ours['both'])}: "
        f"{theirs.median / ours['both'].median:.0f}x stock, {ratio(ours['all'], ours['both'])} all "
        f"keys; counted {(choice + TOP * rows) / 1e6:,.0f} MFLOP against "
        f"{context * rows / 1e6:,.0f} ({counted:.2f}x); largest difference from stock {error:.0e}"
    )


def prompt_of_qwen4(tokens: int, dtype: torch.dtype) -> None:
    """Qwen4's indexer on a prompt: its own forward, once, and ours."""
    name = "transformers.models.qwen4_exp"
    config = importlib.import_module(f"{name}.configuration_qwen4_exp").Qwen4ExpTextConfig(
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=256,
        indexer_budget=2048,
        indexer_compress_ratio=16,
    )
    kind = importlib.import_module(f"{name}.modeling_qwen4_exp").Qwen4ExpTextQSAIndexer
    torch.manual_seed(0)
    module = kind(config, 0).to(dtype).eval()
    hidden = torch.randn(1, tokens, config.hidden_size).to(dtype)
    angles = torch.rand(1, tokens, module.index_head_dim // 4).repeat(1, 1, 2)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    given = (hidden, (angles.cos().to(dtype), angles.sin().to(dtype)), mask, None)
    hook = MeanPoolIndexer(module)
    with torch.no_grad():
        start = time.perf_counter()
        expected = kind.forward(module, *given)
        stock = 1e3 * (time.perf_counter() - start)
        same = (hook(*given) & mask) == expected
        rotate = importlib.import_module(f"{name}.modeling_qwen4_exp").apply_rotary_pos_emb

        def made() -> Any:
            """What both do: the projection, and norm and rotation of the queries."""
            query = module.index_qk_proj(hidden)[..., : 4 * module.index_head_dim]
            query = module.q_layernorm(query.reshape(1, tokens, 4, -1))
            return rotate(query, cos=given[1][0], sin=given[1][1], unsqueeze_dim=2)

        times = interleaved({"ours": lambda: hook(*given), "made": made}, rounds=5, warmup=1)
    ours, own = times["ours"], 1e3 * times["made"].median
    print(
        f"Qwen4's indexer (4 heads of 256), a prompt of {tokens:,}, {dtype}: stock {stock:,.0f} ms "
        f"(once), ours {shown(ours)}: {stock / (1e3 * ours.median):.0f}x; of both {own:.0f} ms are "
        f"the module's projection, norm and rotation, without which it is "
        f"{(stock - own) / (1e3 * ours.median - own):.0f}x; "
        f"{float((~same).any(-1).double().mean()):.2%} of the queries choose otherwise (ties)"
    )


def prompt_memory(tokens: int, heads: int, dtype: torch.dtype) -> None:
    """What choice and attention of a prompt take beside their tensors."""
    torch.manual_seed(0)
    tensors = [
        torch.empty(size, dtype=dtype).normal_()  # no copy, whose memory would hide what is taken
        for size in (
            (1, heads, tokens, NOPE),
            (1, heads, tokens, ROPE),
            (1, tokens, RANK),
            (1, tokens, ROPE),
            (heads, NOPE, RANK),
            (heads, VALUE, RANK),
            (1, tokens, INDEX_HEADS, INDEX_DIM),
            (1, tokens, INDEX_DIM),
        )
    ]
    weights = torch.rand(1, tokens, INDEX_HEADS)
    out_bytes = heads * tokens * VALUE * tensors[0].element_size() + 4 * tokens * TOP
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    chosen = index_topk(*tensors[6:], weights, TOP, causal=True).unsqueeze(1)
    middle = time.perf_counter()
    latent_attention(*tensors[:6], causal=True, indices=chosen)
    end = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = (1024 * (after - before) - out_bytes) / 2**20
    print(
        f"a prompt of {tokens:,}, {heads} heads, {dtype}: choice {middle - start:.2f} s, attention "
        f"{end - middle:.2f} s; at most {more:,.0f} MiB beside inputs, indices and outputs"
    )


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    print(environment())
    for heads in (16, 128):
        prompt_memory(8192, heads, dtype)
    for heads in (16, 128):
        one_token(heads, asked.context, dtype, asked.rounds)
    prompt_of_qwen4(4096, dtype)


if __name__ == "__main__":
    main()
