"""One query against a long context with grouped heads: headwise.attention against PyTorch's SDPA.

    python benchmarks/gqa_decode.py [--context 16384] [--dtypes bfloat16 float32]

32 query and 8 kv heads of 128, as Llama 3 8B. Every round takes another of several caches, so
that K and V are read from memory and not from the processor's cache. The output is compared with
the reference before anything is timed.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from report import Row, environment, print_table

import headwise
from headwise.measure import interleaved, ratio

HEADS, KV_HEADS, DIM = 32, 8, 128


def measure(context: int, dtype: torch.dtype, rounds: int) -> Row:
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, 1, DIM).to(dtype)
    shape = (1, KV_HEADS, context, DIM)
    caches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(4)]
    for key, value in caches:
        given = headwise.attention(query, key, value, causal=True)
        expected = headwise.attention(query, key, value, causal=True, backend="reference")
        # an average over thousands of values, rounded to the dtype
        torch.testing.assert_close(given, expected, atol=2e-3, rtol=2e-2)
    ours, stock = itertools.cycle(caches), itertools.cycle(caches[2:] + caches[:2])
    packed = itertools.cycle(caches[1:] + caches[:1])
    timings = interleaved(
        {
            "stock": lambda: F.scaled_dot_product_attention(query, *next(stock), enable_gqa=True),
            # the torch backend: SDPA with the heads of a group as rows
            "packed": lambda: headwise.attention(
                query, *next(packed), causal=True, backend="torch"
            ),
            "headwise": lambda: headwise.attention(query, *next(ours), causal=True),
        },
        rounds=rounds,
    )
    read = 2 * KV_HEADS * context * DIM * dtype.itemsize
    rate = read / timings["headwise"].median / 1e9
    return Row(
        what=f"{HEADS}/{KV_HEADS} heads, D {DIM}, {context:,} tokens, {str(dtype)[6:]}",
        stock=timings["stock"].median,
        ours=timings["headwise"].median,
        ratio=ratio(timings["stock"], timings["headwise"]),
        note=f"{read / 2**20:.0f} MiB of K and V, {rate:.1f} GB/s; "
        f"SDPA with packed rows takes {ratio(timings['packed'], timings['headwise'])}; "
        f"{headwise.explain(query, *caches[0], causal=True).verdicts[0].reason}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    print(environment())
    with torch.inference_mode():
        rows = [measure(given.context, getattr(torch, d), given.rounds) for d in given.dtypes]
    print_table("GQA, one query", "SDPA enable_gqa", rows)


if __name__ == "__main__":
    main()
