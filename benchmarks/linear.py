"""Linear attention beside the functions of Transformers' files: a step, and a prompt of 512 tokens.

    python benchmarks/linear.py [--rounds 9]

32 heads of 128 x 128 in float32, as the functions compute. A step goes through the states of 30
layers in turn, so that each comes from memory. A and B in turn, in one process.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from report import environment
from torch.nn import functional

from headwise import linear_attention
from headwise.measure import interleaved, ratio
from headwise.measure.machine import read_bandwidth

HEADS, DIM, LAYERS, PROMPT = 32, 128, 30, 512
STOCK = {
    "gated delta rule": (
        "qwen3_next",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        False,
    ),
    "Kimi delta attention": (
        "kimi_linear",
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        True,
    ),
}


def given(tokens: int, *, each: bool) -> dict[str, torch.Tensor]:
    """Arguments of one layer, as stock takes them: [B,S,H,...]."""
    rows = (1, tokens, HEADS)
    return {
        "query": torch.randn(*rows, DIM),
        "key": functional.normalize(torch.randn(*rows, DIM), dim=-1),
        "value": torch.randn(*rows, DIM),
        "g": -torch.rand(*rows, DIM) if each else -torch.rand(rows),
        "beta": torch.rand(rows),
        "initial_state": torch.randn(1, HEADS, DIM, DIM),
    }


def ours(layer: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by our operator."""
    query, key, value = (layer[name].transpose(1, 2) for name in ("query", "key", "value"))
    return linear_attention(
        query,
        key,
        value,
        decay=layer["g"].transpose(1, 2),
        beta=layer["beta"].transpose(1, 2),
        state=layer["initial_state"],
    )


def compared(
    name: str, stock: Callable[..., Any], tokens: int, layers: int, each: bool, rounds: int
) -> None:
    """Time both over so many layers, and print a line."""
    torch.manual_seed(0)
    all_layers = [given(tokens, each=each) for _ in range(layers)]

    def by_stock() -> None:
        for layer in all_layers:
            stock(**layer, output_final_state=True)

    def by_ours() -> None:
        for layer in all_layers:
            ours(layer)

    expected, last = stock(**all_layers[0], output_final_state=True)
    out, state = ours(all_layers[0])
    error = float((out.transpose(1, 2) - expected).abs().max() / expected.abs().max())
    error = max(error, float((state - last).abs().max() / last.abs().max()))
    times = interleaved({"stock": by_stock, "ours": by_ours}, rounds=rounds, warmup=1)
    each_layer = {side: 1e3 * timing.median / layers for side, timing in times.items()}
    moved = 2 * 4 * HEADS * DIM * DIM
    print(
        f"{name}, {tokens} tokens: stock {each_layer['stock']:.3g} ms a layer, ours "
        f"{each_layer['ours']:.3g}: {ratio(times['stock'], times['ours'])}; a state of "
        f"{moved / 2e6:.1f} MB read and written at {moved / each_layer['ours'] / 1e6:.1f} GB/s; "
        f"largest difference {error:.0e}"
    )


def main() -> None:
    """Print a line for each kind and length."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{environment()}; sums over memory {read_bandwidth()[0] / 1e9:.1f} GB/s")
    for name, (family, chunked, recurrent, each) in STOCK.items():
        file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        compared(name, getattr(file, recurrent), 1, LAYERS, each, rounds)
        few = rounds if family == "qwen3_next" else 4  # stock takes seconds
        compared(name, getattr(file, chunked), PROMPT, 1, each, few)


if __name__ == "__main__":
    with torch.no_grad():
        main()
