"""One layer of a model: what mixes its tokens and, beside an encoder, its cross-attention."""

import warnings
from dataclasses import dataclass
from typing import Any

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import integer, token_count
from headwise.spec.dtypes import Dtype
from headwise.spec.state import StateSpec
from headwise.spec.uncovered import Uncovered

Mixer = AttentionSpec | StateSpec | Uncovered


@dataclass(frozen=True, init=False)
class LayerSpec:
    """Layer `index` of a model.

    >>> attention = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
    >>> LayerSpec(0, attention).cache_bytes(10)
    7680

    Args:
        index: position in the stack, from 0.
        mixer: self-attention, what a layer of linear attention keeps, or why headwise does not
            cover the layer.
        cross_attention: attention to an encoder's output.
        shares: index of the earlier layer whose keys and values this one reads; it caches none.
        old: `attention`, `state` and `note`, in which `mixer` was given before.

    Raises:
        SpecError: when a field is in the wrong place.
    """

    index: int
    mixer: Mixer
    cross_attention: AttentionSpec | None = None
    shares: int | None = None

    def __init__(
        self,
        index: int,
        mixer: Mixer | None = None,
        cross_attention: AttentionSpec | None = None,
        *,
        shares: int | None = None,
        **old: Any,
    ) -> None:
        if old or mixer is None:
            mixer = _old_mixer(index, mixer, **old)
        for name, value in (
            ("index", index),
            ("mixer", mixer),
            ("cross_attention", cross_attention),
            ("shares", shares),
        ):
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        integer("index", self.index, least=0)
        if not isinstance(self.mixer, Mixer):
            raise SpecError(
                f"mixer is a {type(self.mixer).__name__} in layer {self.index}: expected an "
                "AttentionSpec, a StateSpec or Uncovered(reason)"
            )
        if self.attention is not None and self.attention.cross:
            raise SpecError(
                f"attention={self.attention} in layer {self.index}: expected self-attention; "
                "give it as cross_attention"
            )
        if self.cross_attention is not None and not self.cross_attention.cross:
            raise SpecError(
                f"cross_attention={self.cross_attention} in layer {self.index}: expected cross=True"
            )
        if self.shares is None:
            return
        integer("shares", self.shares, least=0)
        if self.attention is None or self.shares >= self.index:
            raise SpecError(
                f"shares={self.shares} in layer {self.index}: expected attention that reads the "
                "keys and values of an earlier layer"
            )

    @property
    def attention(self) -> AttentionSpec | None:
        """The self-attention; None where something else mixes the tokens."""
        return self.mixer if isinstance(self.mixer, AttentionSpec) else None

    @property
    def cached(self) -> AttentionSpec | None:
        """The self-attention whose keys and values this layer caches; None where it caches none."""
        attention = self.attention
        keeps = attention is not None and attention.cached and self.shares is None
        return attention if keeps else None

    def flops(self, query_length: int, context: int, encoder_context: int = 0) -> int:
        """Operations of the mixer and the cross-attention; projections are weights, not counted.

        Raises:
            ShapeError: as `AttentionSpec.flops`.
        """
        total = self.mixer.flops(query_length, context)
        if self.cross_attention is not None:
            total += self.cross_attention.flops(query_length, encoder_context)
        return total

    def cache_bytes(
        self,
        context: int,
        batch: int = 1,
        dtype: Dtype = "bfloat16",
        encoder_context: int = 0,
    ) -> int:
        """Bytes of the self-attention cache at `context` and the cross one at `encoder_context`.

        Where the layer keeps a state instead, its bytes.

        Raises:
            ShapeError: for a negative context or a `batch` below 1.
            SpecError: for an unknown dtype.
        """
        token_count("context", context)
        total = 0 if self.shares is not None else self.mixer.cache_bytes(context, batch, dtype)
        if self.cross_attention is not None:
            total += self.cross_attention.cache_bytes(encoder_context, batch, dtype)
        return total

    def __getattr__(self, name: str) -> Any:
        if name not in ("note", "state"):
            raise AttributeError(f"LayerSpec has no attribute {name!r}")
        _warn(f"LayerSpec.{name}")
        if name == "note":
            return "" if self.attention is not None else str(self.mixer)
        return self.mixer if isinstance(self.mixer, StateSpec) else None

    def __str__(self) -> str:
        own = str(self.mixer)
        if self.shares is not None:
            own += f", of layer {self.shares}"
        return own if self.cross_attention is None else f"{own}; {self.cross_attention}"


def _old_mixer(
    index: int, mixer: Mixer | None, note: str = "", state: StateSpec | None = None, **old: Any
) -> Mixer:
    """The mixer of what `LayerSpec` was given before it had one."""
    _warn("LayerSpec(attention=, note=, state=)")
    if "attention" in old:  # `dataclasses.replace` gives the mixer of before as well
        mixer = old["attention"]
    mixers = [each for each in (mixer, state) if each is not None]
    if len(mixers) > 1:
        raise SpecError(f"{mixers[0]} and {mixers[1]} in layer {index}: expected one of them")
    if not mixers and not note:
        raise SpecError(f"mixer is missing in layer {index}: expected what mixes its tokens")
    return mixers[0] if mixers else Uncovered(note)


def _warn(name: str) -> None:
    warnings.warn(f"{name} is old: use LayerSpec.mixer", DeprecationWarning, stacklevel=3)
