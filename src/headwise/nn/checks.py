"""What the modules ask of what they are given."""

from typing import Any

from headwise.caches import Cache
from headwise.errors import OptionError, ShapeError, UnsupportedError
from headwise.nn.rope import Rope
from headwise.ops import require_tensor
from headwise.spec import AttentionSpec, StateSpec
from headwise.spec.checks import positive_int


def size_or(name: str, size: int | None, default: int) -> int:
    """`size`, at least 1, or the default where it is None."""
    return default if size is None else positive_int(name, size)


def check_spec(spec: Any) -> None:
    """Raise `OptionError` unless `spec` is an AttentionSpec."""
    if not isinstance(spec, AttentionSpec):
        raise OptionError(f"spec is a {type(spec).__name__}, expected an AttentionSpec")


def check_state_spec(spec: Any) -> None:
    """Raise unless `spec` is a StateSpec of linear attention."""
    if not isinstance(spec, StateSpec):
        raise OptionError(f"spec is a {type(spec).__name__}, expected a StateSpec")
    if not spec.heads:
        raise UnsupportedError(f"{spec} has no state: expected linear attention")
    channels = 2 * spec.query_heads * spec.key_dim + spec.heads * spec.value_dim
    if spec.conv_channels not in (0, channels):
        raise UnsupportedError(
            f"{spec}: a convolution of {spec.conv_channels} channels, expected {channels}, those "
            "of query, key and value, or 0"
        )


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
    if cache.gives == "split":
        raise ShapeError(
            f"cache is a {type(cache).__name__}, which gives a part of the tokens: headwise.attach "
            "with context_parallel spreads those of a model"
        )
    if cache.sinks:
        raise ShapeError(
            f"the cache keeps {cache.sinks} first tokens, this layer does not see them"
        )
    if cache.window not in (None, window):
        own = "no window" if window is None else f"a window of {window}"
        raise ShapeError(f"the cache has a window of {cache.window}, this layer {own}")
