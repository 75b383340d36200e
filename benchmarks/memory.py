"""Exact search in a memory beside full attention over the same rows, and steps of a layer with one.

    python benchmarks/memory.py [--rounds 15] [--million]

Search: the best 32 of 65,536 rows for 1 and 8 queries (`top_keys`), and with the attention to them
(`Memory`), beside attention to all rows; bytes of the keys over the time, of the read bandwidth
that is measured in the same run. Then a million rows, and a training step of a layer by the rows
that its memory holds. A and B in turn, in one process; medians and quartiles.
"""

import argparse
from collections.abc import Callable

import torch
from report import environment

import headwise
from headwise import AttentionSpec
from headwise.measure import Timing, interleaved, ratio
from headwise.measure.machine import read_bandwidth
from headwise.nn import Attention, Memory, Rope
from headwise.ops import top_keys

ROWS, TOP = 65_536, 32
# H/K heads and D: a GPT-2's, Llama 3's, one kv head as in the paper's 2-layer ablations, SmolLM2's
SHAPES = ((12, 12, 64), (32, 8, 128), (8, 1, 128), (9, 3, 64))


def shown(timing: Timing) -> str:
    """The median, and the quartiles."""
    low, high = timing.quartiles
    return f"{1e3 * timing.median:.3g} ms ({1e3 * low:.3g}-{1e3 * high:.3g})"


def filled(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rows: int) -> Memory:
    """A memory that holds so many random rows of one sequence."""
    memory = Memory(size=rows, top=TOP)
    memory.serve(AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim))
    key, value = (torch.randn(1, kv_heads, rows, dim).to(dtype) for _ in range(2))
    memory.remember(key, value)
    return memory


def search(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    queries: int,
    rows: int,
    rounds: int,
    bandwidth: float,
) -> None:
    heads, kv_heads, dim = shape
    memory = filled(heads, kv_heads, dim, dtype, rows)
    assert memory.keys is not None
    assert memory.values is not None
    key, value = memory.keys, memory.values
    query = torch.randn(1, heads, queries, dim).to(dtype)
    chosen = top_keys(query, key, TOP)
    score = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)
    least = score.gather(-1, chosen.long()).amin(-1)
    left = score.scatter(-1, chosen.long(), float("-inf")).amax(-1)
    assert bool((least > left - 1e-4 * score.abs().amax()).all())
    del score

    def retrieve() -> None:
        memory._read(query, value, dim**-0.5, None)

    timings = interleaved(
        {
            "search": lambda: top_keys(query, key, TOP),
            "with attention": retrieve,
            "full": lambda: headwise.attention(query, key, value),
        },
        rounds=rounds,
    )
    read = key.numel() * key.element_size()
    rate = read / timings["search"].median
    print(
        f"{heads}/{kv_heads} heads, D {dim}, {rows:,} rows, {queries} queries, "
        f"{str(dtype).removeprefix('torch.')}: search {shown(timings['search'])}, "
        f"{rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of the bandwidth; with attention "
        f"{shown(timings['with attention'])}; full attention {shown(timings['full'])}: search "
        f"{ratio(timings['search'], timings['full']):.2f}, with attention "
        f"{ratio(timings['with attention'], timings['full']):.2f}"
    )


def training_step(rounds: int) -> None:
    """Forward and backward of a layer over a segment of 512, and decoding, by what it holds."""
    spec = AttentionSpec(heads=8, kv_heads=8, head_dim=64, value_dim=64)
    x = torch.randn(1, 512, 512)

    def layer(rows: int | None) -> Attention:
        made = Attention(spec, rope=Rope(64), memory=None if rows is None else Memory(ROWS, TOP))
        if made.memory is not None and rows is not None:
            made.memory.remember(*torch.randn(2, 1, 8, rows, 64))
        return made

    def step(layer: Attention) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad()
            layer(x).square().mean().backward()

        return run

    layers = {"none": layer(None)} | {f"{rows:,}": layer(rows) for rows in (8192, ROWS)}
    timings = interleaved({name: step(each) for name, each in layers.items()}, rounds=rounds)
    for name, timing in timings.items():
        print(
            f"training step, 8 heads of 64, a segment of 512, float32, {name} rows: "
            f"{shown(timing)}, {ratio(timing, timings['none'])} of the step without a memory"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--million", action="store_true", help="a million rows, too")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(environment())
    bandwidth, read, _ = read_bandwidth()
    print(f"sums over {read / 2**20:,.0f} MiB: {bandwidth / 1e9:.1f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for queries in (1, 8):
                search(shape, dtype, queries, ROWS, asked.rounds, bandwidth)
    if asked.million:
        for queries in (1, 8):
            search((8, 1, 64), torch.bfloat16, queries, 2**20, asked.rounds, bandwidth)
    with torch.enable_grad():
        training_step(asked.rounds)
    now, _, _ = read_bandwidth()
    print(f"sums over memory afterwards: {now / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
