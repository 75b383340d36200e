"""What a call of headwise.attention adds in Python to the operator that it ends in.

python benchmarks/overhead.py
"""

import time
from collections.abc import Callable

import torch
from report import environment

import headwise


def microseconds(call: Callable[[], object], calls: int = 20_000, rounds: int = 7) -> float:
    """The best mean of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
    return best * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(environment())
    query, kv = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 4, 16)
    headwise.attention(query, kv, kv, backend="cpu")  # loads the library
    level = torch.ops.headwise.best_level()
    tails, stored = (None,) * 2, (None, 0, None, None, None)
    options = (True, 0, 0.0, *(None,) * 4)
    operator = torch.ops.headwise.attend.default
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        calls = {
            "the operator": lambda: operator(
                *(query, kv, kv, *tails, *stored, None, 0.25, False, level), *options
            ),
            "headwise.attention": lambda: headwise.attention(query, kv, kv, causal=True),
            "scaled_dot_product_attention": lambda: sdpa(query, kv, kv, enable_gqa=True),
        }
        for name, call in calls.items():
            print(f"{name:<30}{microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
