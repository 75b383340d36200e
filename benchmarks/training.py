"""What one attention layer costs in training, at equal width: FLOPs and kept activations a token.

python benchmarks/training.py [--tokens 512]

The hidden size is DeepSeek-V2's, 5120. MHA, GQA and MQA have 40 heads of 128; MLA has DeepSeek-V2's
128 heads, with queries projected directly and with its compression to 1536. FLOPs are those of
forward and backward, counted by PyTorch's FlopCounterMode with the products of its fused attention
added (a causal call counts in full); kept is every tensor that autograd keeps for the backward
pass, each storage once, weights excepted, in float32. "Again" means that everything behind the
latents (for the others: behind the input) is computed again in the backward pass.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from report import environment
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from headwise import AttentionSpec
from headwise.measure.memory import kept_activations
from headwise.nn import Attention, LatentAttention, Rope

SIZE = 5120
MHA = AttentionSpec(heads=40, kv_heads=40, head_dim=128, value_dim=128)
MLA = AttentionSpec(
    heads=128, kv_heads=128, head_dim=192, value_dim=128, latent_rank=512, rope_dim=64
)
SPECS = {
    "MHA": MHA,
    "GQA": replace(MHA, kv_heads=8),
    "MQA": replace(MHA, kv_heads=1),
    "MLA, queries direct": MLA,
    "MLA, queries compressed": replace(MLA, query_rank=1536),
}


def plain(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The layer as it is."""
    return layer(hidden)


def again(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The layer with what is behind its latents, or all of it, computed twice."""
    if isinstance(layer, LatentAttention):
        positions = torch.arange(hidden.shape[1])
        latents = layer.compress(hidden, positions)

        def attend(*given: Tensor) -> Tensor:
            return layer.attend(*given, positions=positions)

        return checkpoint(attend, *latents, use_reentrant=False)
    return checkpoint(layer, hidden, use_reentrant=False)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted sum, from the shapes."""
    return 2 * torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores once more, then the gradients of weights, values, queries and keys."""
    return 2 * torch.Size(query[:-1]).numel() * key[-2] * (3 * query[-1] + 2 * value[-1])


_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


def flops(run: Callable[[], Tensor]) -> int:
    """FLOPs of `run` and its backward pass."""
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        run().sum().backward()
    return counter.get_total_flops()


def main() -> None:
    """Print one row a mechanism."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    tokens = parser.parse_args().tokens
    print(environment())
    table = Table(
        "",
        "parameters",
        "cache a token",
        "MFLOP a token",
        "kept a token",
        "MFLOP, again",
        "kept, again",
        title=f"{tokens} tokens, hidden size {SIZE}, float32",
        box=box.MARKDOWN,
    )
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        kind = Attention if spec.latent_rank is None else LatentAttention
        layer = kind(spec, SIZE, rope=Rope(spec.rope_dim or spec.head_dim))
        hidden = torch.randn(1, tokens, SIZE, requires_grad=True)
        cells = []
        for how in (plain, again):
            run = partial(how, layer, hidden)
            cells.append(f"{flops(run) / tokens / 1e6:,.0f}")
            cells.append(f"{kept_activations(layer, run) / tokens / 1024:,.0f} KiB")
        parameters = sum(at.numel() for at in layer.parameters())
        cache = spec.cache_bytes(1, dtype="float32") / 1024
        table.add_row(name, f"{parameters / 1e6:,.0f}M", f"{cache:,.1f} KiB", *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
