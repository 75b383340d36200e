"""What both layers of attention have: a spec, a rotary embedding, the way in and the way out."""

import torch
from torch import Tensor, nn

from headwise.caches import Cache
from headwise.nn.checks import size_or
from headwise.nn.rope import Rope, check_positions
from headwise.ops import KV, check_mask_and_bias
from headwise.spec import AttentionSpec


class AttentionLayer(nn.Module):
    """A layer of attention around projections that its class makes.

    Args:
        spec: of the layer.
        hidden_size: E; None: `spec.heads * head_size`.
        head_size: elements per head that the default of E counts.
        rope: that queries and keys share, or None.
    """

    o_proj: nn.Linear

    def __init__(
        self, spec: AttentionSpec, hidden_size: int | None, head_size: int, rope: Rope | None
    ) -> None:
        super().__init__()
        self.spec, self.rope = spec, rope
        self.hidden_size = size_or("hidden_size", hidden_size, spec.heads * head_size)

    def start(
        self,
        hidden: Tensor,
        cache: Cache | None,
        context: int,
        *,
        positions: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The positions of `hidden` [B, S, E], [S] or where sequences differ in length [B, S].

        Those given, or those after what the cache holds. What the operator would refuse over
        `context` keys is refused here, before a cache has been written to.

        Raises:
            ShapeError: positions, a mask or a bias that do not fit.
        """
        batch, length = hidden.shape[:2]
        if positions is not None:
            check_positions(positions, batch, length)
        check_mask_and_bias(mask, bias, hidden, (batch, self.spec.heads, length, context))
        if positions is not None:
            return positions
        steps = torch.arange(length, device=hidden.device)
        if cache is None:
            return steps
        if cache.starts is not None:
            return torch.tensor(cache.starts, device=hidden.device)[:, None] + steps
        return steps + cache.length

    def finish(self, out: Tensor) -> Tensor:
        """The operator's output [B, H, S, V] back to [B, S, E]."""
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.spec)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * D] to [B, H, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def append(
    cache: Cache | None, first: Tensor, second: Tensor
) -> tuple[Tensor | None, Tensor | None, KV | None]:
    """Add tokens to a cache; all that attention is over, as two tensors or as one view."""
    rows = (first, second) if cache is None else cache.append(first, second)
    return (*rows, None) if isinstance(rows, tuple) else (None, None, rows)
