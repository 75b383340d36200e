"""A context on two processes of one core each, against one process of one core.

    python benchmarks/context_parallel.py [--context 32768] [--rounds 15]

Two processes, each pinned to a core of its own and with one thread, over gloo on this machine. In
turn: the first alone attends to the whole context (the other sleeps), then both attend to their
blocks of 64 tokens, gather [out | lse] and merge. Latents of 512 + 64 with 128 heads, and 32 query
on 8 kv heads of 128, in bfloat16, in several layers so that they stream from memory; then a step of
4 layers of Llama-3.2-1B's shape. Beside them the bytes per second that one core reads, and that
both read at once, in the same turns: what a bound by memory can gain. And a gather alone. Medians,
quartiles, and the median of the ratios of each turn with its quartiles.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from report import environment
from torch import Tensor

import headwise
from headwise.caches import ContiguousCache, Share, SplitCache
from headwise.hf import use_own_layers
from headwise.hf.parallel.attend import gathered
from headwise.hf.parallel.ranks import Ranks
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.ops import AttentionCall, Options, run_call

RANKS, HEADS, KV_HEADS, DIM, RANK, ROPE, LATENT_HEADS = 2, 32, 8, 128, 512, 64, 128
Call = Callable[[], Any]


def seconds(call: Call) -> float:
    """What both wait for to begin takes here until it has ended."""
    dist.barrier()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turns(rounds: int, alone: Call, both: Call, parts: int = 1) -> list[tuple[float, float]]:
    """Seconds of a part: of the first rank alone, and of both together."""
    nothing: Call = lambda: None  # noqa: E731
    first = dist.get_rank() == 0
    taken = []
    for _ in range(rounds + 2):
        one = seconds(alone if first else nothing)
        two = seconds(both)
        taken.append((one / parts, two / parts))
    return taken[2:]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def show(name: str, taken: list[tuple[float, float]]) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        one, two = (quartiles([1e3 * each for each in side]) for side in zip(*taken, strict=True))
        gained = quartiles([alone / both for alone, both in taken])
        print(
            f"{name}: one {one[0]:.3g} ms ({one[1]:.3g}-{one[2]:.3g}), two {two[0]:.3g} ms "
            f"({two[1]:.3g}-{two[2]:.3g}), {gained[0]:.2f} times ({gained[1]:.2f}-{gained[2]:.2f})",
            flush=True,
        )


def merged(ranks: Ranks, out: Tensor, lse: Tensor) -> Tensor:
    """As an attached model does it."""
    return headwise.merge_attention(*gathered(ranks.gather, out, lse))[0]


def bandwidth(ranks: Ranks, rounds: int) -> None:
    """What one core reads, and what both read together."""
    numbers = torch.ones(2**28)  # 1 GiB, which no cache of the processor holds
    taken = turns(rounds, lambda: numbers.sum(), lambda: numbers.sum())
    show("reading 1 GiB in each", taken)
    if ranks.rank == 0:
        one, two = (numbers.nbytes / statistics.median(side) for side in zip(*taken, strict=True))
        print(f"  {one / 1e9:.1f} GB/s by one core, {2 * two / 1e9:.1f} GB/s by both")


def exchange(ranks: Ranks, rounds: int) -> None:
    """A gather of what one layer sends for a token, and of 4 MiB."""
    for heads in (HEADS, LATENT_HEADS, 16_132):
        sent = torch.randn(1, heads, 1, DIM + 2).bfloat16()
        taken = [seconds(lambda sent=sent: ranks.gather(sent)) for _ in range(20 * rounds)]
        if ranks.rank == 0:
            middle, low, high = quartiles([1e6 * each for each in taken])
            print(f"a gather of {sent.nbytes:,} bytes: {middle:.0f} us ({low:.0f}-{high:.0f})")


def layers(sizes: tuple[tuple[int, int], ...], context: int, count: int) -> tuple[Any, Any]:
    """Random rows [1, heads, context, dim]: all of them on the first rank, and each one's part."""
    rank, whole, parts = dist.get_rank(), [], []
    for number in range(count):
        torch.manual_seed(number)
        rows = [torch.randn(1, heads, context, dim).bfloat16() for heads, dim in sizes]
        if rank == 0:
            whole.append(ContiguousCache().append(*rows))
        parts.append(SplitCache(ContiguousCache(), Share(rank, RANKS)).append(*rows))
    return whole, parts


def latents(ranks: Ranks, context: int, rounds: int) -> None:
    """MLA, absorbed: the attention, and then with its projections, which every rank does in full.

    A rank sends results that are projected to 128 dims; without projections, as many of the 512.
    """
    count = 4
    whole, parts = layers(((1, RANK), (1, ROPE)), context, count)
    torch.manual_seed(9)
    nope, turned = (torch.randn(1, LATENT_HEADS, 1, dim).bfloat16() for dim in (DIM, ROPE))
    up, down = (0.05 * torch.randn(2, LATENT_HEADS, DIM, RANK)).bfloat16()
    absorbed = torch.randn(1, LATENT_HEADS, 1, RANK).bfloat16()

    def attend(rows: Any) -> tuple[Tensor, Tensor]:
        options = Options(scale=(DIM + ROPE) ** -0.5, return_lse=True)
        out, lse = run_call(AttentionCall(absorbed, rows[0], rows[0], options, turned, rows[1]))
        assert lse is not None
        return out[..., :DIM], lse

    def project(rows: Any) -> Any:
        given = (nope, turned, rows[0].squeeze(1), rows[1].squeeze(1), up, down)
        return headwise.latent_attention(*given, paradigm="absorbed", return_lse=True)

    for name, call in (("", attend), (" with projections", project)):

        def alone(call: Any = call) -> list[Tensor]:
            return [call(rows)[0] for rows in whole]

        def both(call: Any = call) -> list[Tensor]:
            return [merged(ranks, *call(rows)) for rows in parts]

        check(alone, both)
        taken = turns(rounds, alone, both, count)
        show(f"MLA, {LATENT_HEADS} heads{name}, {context:,} tokens", taken)


def groups(ranks: Ranks, context: int, rounds: int) -> None:
    """GQA."""
    count = 4
    whole, parts = layers(((KV_HEADS, DIM), (KV_HEADS, DIM)), context, count)
    torch.manual_seed(9)
    query = torch.randn(1, HEADS, 1, DIM).bfloat16()

    def alone() -> list[Tensor]:
        return [headwise.attention(query, *rows) for rows in whole]

    def both() -> list[Tensor]:
        own = (headwise.attention(query, *rows, return_lse=True) for rows in parts)
        return [merged(ranks, *each) for each in own]

    check(alone, both)
    show(f"GQA {HEADS}/{KV_HEADS}, {context:,} tokens", turns(rounds, alone, both, count))


def check(alone: Call, both: Call) -> None:
    """Both give the same, as the dtype rounds."""
    split = both()
    if dist.get_rank() == 0:
        for one, other in zip(alone(), split, strict=True):
            torch.testing.assert_close(one.float(), other.float(), atol=2e-2, rtol=2e-2)


def step(ranks: Ranks, context: int, rounds: int) -> None:
    """A whole step of 4 layers of Llama-3.2-1B's shape, and a small vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2 * context,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    models = [transformers.LlamaForCausalLM(config).bfloat16().eval()]
    models.append(transformers.LlamaForCausalLM(config).bfloat16().eval())
    models[1].load_state_dict(models[0].state_dict(), assign=True)
    headwise.attach(models[0])
    headwise.attach(models[1], context_parallel=ranks.group)
    calls = []
    for model in models:
        own: Any = use_own_layers(DynamicCache(config=config), model._headwise.choice)
        for number, layer in enumerate(own.layers):
            torch.manual_seed(number)
            layer.update(*torch.randn(2, 1, 8, context, 64).bfloat16())

        def one(model: Any = model, cache: Any = own) -> None:
            model(torch.tensor([[5]]), use_cache=True, **{CACHE: cache})
            cache.crop(-1)

        calls.append(one)
    one, both = calls
    show(f"a step of 4 layers, {context:,} tokens", turns(rounds, one, both))
    if ranks.rank == 0:
        weights = sum(each.nbytes for each in models[0].parameters())
        cache = 4 * 2 * 8 * 64 * 2 * context
        print(
            f"  one reads {weights:,} bytes of weights and {cache:,} of cache; two halve the cache"
        )


def main(rank: int, store: str, arguments: argparse.Namespace) -> None:
    """One of the processes."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    ranks = Ranks.of(dist.group.WORLD)
    if rank == 0:
        print(environment())
    with torch.no_grad():
        bandwidth(ranks, arguments.rounds)
        exchange(ranks, arguments.rounds)
        latents(ranks, arguments.context, arguments.rounds)
        groups(ranks, arguments.context, arguments.rounds)
        step(ranks, arguments.context, arguments.rounds)
        bandwidth(ranks, arguments.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=15)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (f"{folder}/store", parser.parse_args()), nprocs=RANKS)
