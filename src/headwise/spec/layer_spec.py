"""One layer of a model: its self-attention and, beside an encoder, its cross-attention."""

from dataclasses import dataclass

from headwise.errors import SpecError
from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.checks import integer, token_count
from headwise.spec.dtypes import Dtype
from headwise.spec.state_spec import StateSpec


@dataclass(frozen=True)
class LayerSpec:
    """Layer `index` of a model.

    >>> attention = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
    >>> LayerSpec(0, attention).cache_bytes(10)
    7680

    Args:
        index: position in the stack, from 0.
        attention: self-attention, or None for a layer that has none or one not covered here.
        cross_attention: attention to an encoder's output.
        note: why `attention` is None.
        state: what a layer of linear attention keeps.
        shares: index of the earlier layer whose keys and values this one reads; it caches none.

    Raises:
        SpecError: when a field is in the wrong place or the note is missing.
    """

    index: int
    attention: AttentionSpec | None
    cross_attention: AttentionSpec | None = None
    note: str = ""
    state: StateSpec | None = None
    shares: int | None = None

    def __post_init__(self) -> None:
        integer("index", self.index, least=0)
        if self.attention is None and not self.note:
            raise SpecError(f"note is empty in layer {self.index}: say why attention is None")
        if self.attention is not None and self.attention.cross:
            raise SpecError(
                f"attention={self.attention} in layer {self.index}: expected self-attention; "
                "give it as cross_attention"
            )
        if self.cross_attention is not None and not self.cross_attention.cross:
            raise SpecError(
                f"cross_attention={self.cross_attention} in layer {self.index}: expected cross=True"
            )
        if self.state is not None and self.attention is not None:
            raise SpecError(
                f"state and attention={self.attention} in layer {self.index}: expected one of them"
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
    def cached(self) -> AttentionSpec | None:
        """The self-attention whose keys and values this layer caches; None where it caches none."""
        at = self.attention
        return None if at is None or self.shares is not None or not at.cached else at

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
        total = 0
        if self.cached is not None:
            total += self.cached.cache_bytes(context, batch, dtype)
        if self.state is not None:
            total += self.state.nbytes(batch, dtype)
        if self.cross_attention is not None:
            total += self.cross_attention.cache_bytes(encoder_context, batch, dtype)
        return total

    def __str__(self) -> str:
        own = self.note if self.attention is None else str(self.attention)
        if self.shares is not None:
            own += f", of layer {self.shares}"
        return own if self.cross_attention is None else f"{own}; {self.cross_attention}"
