"""Linear attention beside the functions of Transformers' files: a step, and a prompt of 512 tokens.

    python benchmarks/linear.py [--rounds 9]

Each function with what an attached model puts in its place, on the same tensors in float32, as the
functions compute. A step goes through the states of 30 layers in turn, so that each comes from
memory; ours changes them in their place. A and B in turn, in one process.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from report import environment
from torch.nn import functional

from headwise.hf.linear import KINDS
from headwise.measure import interleaved, ratio
from headwise.measure.machine import read_bandwidth

LAYERS, PROMPT = 30, 512
# Delta rules: heads of D x D. State-space duality: heads of V, states of N, with one B and C.
HEADS, DIM = 32, 128
SSD_HEADS, SSD_VALUE, SSD_STATE, CHUNK = 64, 64, 128, 256
CHANNELS, WIDTH = 8192, 4
FUNCTIONS = {each.name: each for kind in KINDS for each in kind.functions}


@dataclass(frozen=True)
class Case:
    """A function of a file of Transformers, and arguments of one layer for so many tokens."""

    name: str
    family: str
    function: str
    tokens: int
    given: Callable[[int], dict[str, Any]]

    @property
    def layers(self) -> int:
        """How many layers take their turn."""
        return LAYERS if self.tokens == 1 else 1


def delta(tokens: int, *, each: bool) -> dict[str, Any]:
    """Of a delta rule; each: a decay for every dim of a key."""
    rows = (1, tokens, HEADS)
    return {
        "query": torch.randn(*rows, DIM),
        "key": functional.normalize(torch.randn(*rows, DIM), dim=-1),
        "value": torch.randn(*rows, DIM),
        "g": -torch.rand(*rows, DIM) if each else -torch.rand(rows),
        "beta": torch.rand(rows),
        "initial_state": torch.randn(1, HEADS, DIM, DIM),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def kda(tokens: int) -> dict[str, Any]:
    """Of Kimi delta attention."""
    return delta(tokens, each=True)


def gated(tokens: int) -> dict[str, Any]:
    """Of the gated delta rule."""
    return delta(tokens, each=False)


def ssd(tokens: int) -> dict[str, Any]:
    """Of a prompt in state-space duality."""
    return {
        "hidden_states": torch.randn(1, tokens, SSD_HEADS, SSD_VALUE),
        "dt": torch.randn(1, tokens, SSD_HEADS),
        "A": -torch.rand(SSD_HEADS),
        "B": torch.randn(1, tokens, 1, SSD_STATE),
        "C": torch.randn(1, tokens, 1, SSD_STATE),
        "chunk_size": CHUNK,
        "D": torch.randn(SSD_HEADS),
        "dt_bias": torch.randn(SSD_HEADS),
        "initial_states": torch.randn(1, SSD_HEADS, SSD_VALUE, SSD_STATE),
        "dt_softplus": True,
        "return_final_states": True,
    }


def ssd_step(_: int) -> dict[str, Any]:
    """Of a token in state-space duality; the state is first."""
    return {
        "state": torch.randn(1, SSD_HEADS, SSD_VALUE, SSD_STATE),
        "hidden_states": torch.randn(1, SSD_HEADS, SSD_VALUE),
        "dt": torch.randn(1, SSD_HEADS, 1).expand(-1, -1, SSD_VALUE),
        "A": (-torch.rand(SSD_HEADS, 1, 1)).expand(-1, SSD_VALUE, SSD_STATE),
        "B": torch.randn(1, 1, SSD_STATE),
        "C": torch.randn(1, 1, SSD_STATE),
        "D": torch.randn(SSD_HEADS, 1).expand(-1, SSD_VALUE),
        "dt_bias": torch.randn(SSD_HEADS, 1).expand(-1, SSD_VALUE),
        "dt_softplus": True,
    }


def convolution(tokens: int) -> dict[str, Any]:
    """Of the convolution, its channels side by side as a projection leaves them."""
    return {
        "hidden_states": torch.randn(1, tokens, CHANNELS).transpose(1, 2),
        "weight": torch.randn(CHANNELS, WIDTH),
        "activation": "silu",
    }


def convolution_step(_: int) -> dict[str, Any]:
    """The same of one token."""
    return convolution(1) | {"conv_state": torch.randn(1, CHANNELS, WIDTH)}


CASES = (
    Case("gated delta rule", "qwen3_next", "torch_recurrent_gated_delta_rule", 1, gated),
    Case("gated delta rule", "qwen3_next", "torch_chunk_gated_delta_rule", PROMPT, gated),
    Case("Kimi delta attention", "kimi_linear", "recurrent_kimi_delta_attention", 1, kda),
    Case("Kimi delta attention", "kimi_linear", "chunk_kimi_delta_attention", PROMPT, kda),
    Case("state-space duality", "mamba2", "mamba2_selective_state_update", 1, ssd_step),
    Case("state-space duality", "mamba2", "mamba2_chunk_scan", PROMPT, ssd),
    Case("convolution", "qwen3_next", "causal_conv1d_update", 1, convolution_step),
    Case("convolution", "qwen3_next", "causal_conv1d_fn", PROMPT, convolution),
)


def tensors(found: Any) -> list[torch.Tensor]:
    """What a function gave."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def compared(case: Case, rounds: int) -> None:
    """Time both over the layers, and print a line."""
    torch.manual_seed(0)
    layers = [case.given(case.tokens) for _ in range(case.layers)]
    file = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    stock = getattr(file, case.function)
    ours = FUNCTIONS[case.function].ours(stock)
    copies = [
        {
            name: value.clone() if isinstance(value, torch.Tensor) and "state" in name else value
            for name, value in layers[0].items()
        }
        for _ in range(2)
    ]
    pairs = zip(tensors(ours(**copies[0])), tensors(stock(**copies[1])), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def run(function: Callable[..., Any]) -> Callable[[], None]:
        def over_layers() -> None:
            for layer in layers:
                function(**layer)

        return over_layers

    times = interleaved({"stock": run(stock), "ours": run(ours)}, rounds=rounds, warmup=1)
    each = {side: 1e3 * timing.median / case.layers for side, timing in times.items()}
    line = (
        f"{case.name}, {case.tokens} tokens: stock {each['stock']:.3g} ms a layer, ours "
        f"{each['ours']:.3g}: {ratio(times['stock'], times['ours'])}; "
        f"largest difference {error:.0e}"
    )
    states = [value for name, value in layers[0].items() if name in ("initial_state", "state")]
    if case.tokens == 1 and states:
        moved = 2 * 4 * states[0].numel()
        rate = moved / each["ours"] / 1e6
        line += f"; a state of {moved / 2e6:.1f} MB read and written at {rate:.1f} GB/s"
    print(line, flush=True)


def main() -> None:
    """Print a line for each kind and length."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{environment()}; sums over memory {read_bandwidth()[0] / 1e9:.1f} GB/s")
    for case in CASES:
        slow = case.function == "chunk_kimi_delta_attention"  # stock takes seconds
        compared(case, 4 if slow else rounds)


if __name__ == "__main__":
    with torch.no_grad():
        main()
