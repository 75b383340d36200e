"""What the modules ask of what they are given."""

from typing import Any

import torch
from torch import Tensor

from headwise.caches import Cache
from headwise.errors import OptionError, ShapeError
from headwise.nn.rope import Rope, check_positions
from headwise.ops import check_mask_and_bias, require_tensor
from headwise.spec import AttentionSpec
from headwise.spec.checks import positive_int


def check_spec(spec: Any) -> None:
    """Raise `OptionError` unless `spec` is an AttentionSpec."""
    if not isinstance(spec, AttentionSpec):
        raise OptionError(f"spec is a {type(spec).__name__}, expected an AttentionSpec")


def size_or(name: str, given: int | None, default: int) -> int:
    """`given`, at least 1, or the default where there is none."""
    return default if given is None else positive_int(name, given)


def check_rope(rope: Any, dim: int, *, whole: bool) -> None:
    """Raise `OptionError` unless `rope` is None or turns (`whole`: all of) `dim` elements."""
    if rope is None:
        return
    if not isinstance(rope, Rope):
        raise OptionError(f"rope is a {type(rope).__name__}, expected a headwise.nn.Rope")
    if rope.dim > dim or (whole and rope.dim < dim):
        most = "" if whole else "at most "
        raise OptionError(f"rope turns {rope.dim} elements, expected {most}{dim} in this layer")


def check_hidden(name: str, hidden: Any, size: int) -> None:
    """Raise `ShapeError` unless `hidden` is [B, S, size]."""
    require_tensor(name, hidden, 3)
    if hidden.shape[2] != size:
        raise ShapeError(f"{name} has shape {list(hidden.shape)}, expected [B, S, E] with E={size}")


def check_cache(cache: Any, window: int | None, *, cross: bool = False) -> None:
    """Raise `ShapeError` unless `cache` is None or one that a layer of this window can use."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ShapeError(
            f"cache is a {type(cache).__name__}, expected one of headwise.caches, a new one for "
            "each layer"
        )
    if cross and cache.gives != "rows":
        raise ShapeError(
            f"cross-attention was given a {type(cache).__name__}, expected a contiguous one"
        )
    if cache.sinks:
        raise ShapeError(
            f"the cache keeps {cache.sinks} first tokens, this layer does not see them"
        )
    if cache.window not in (None, window):
        own = "no window" if window is None else f"a window of {window}"
        raise ShapeError(f"the cache has a window of {cache.window}, this layer {own}")


def next_positions(cache: Cache | None, hidden: Tensor) -> Tensor:
    """[S] or, where sequences differ in length, [B, S]: positions after what the cache holds."""
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    if cache is None:
        return steps
    if cache.starts is not None:
        return torch.tensor(cache.starts, device=hidden.device)[:, None] + steps
    return steps + cache.length


def check_extras(
    hidden: Tensor, heads: int, context: int, positions: Any, mask: Any, bias: Any = None
) -> None:
    """Raise `ShapeError` on what the operator would refuse, before a cache has been written to."""
    batch, length = hidden.shape[:2]
    if positions is not None:
        check_positions(positions, batch, length)
    check_mask_and_bias(mask, bias, hidden, (batch, heads, length, context))
