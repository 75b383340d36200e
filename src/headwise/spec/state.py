"""What a layer keeps instead of a cache: a state whose size never changes.

Of linear attention, of a state-space model (Mamba-2), or of a short convolution.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

from headwise.errors import SpecError
from headwise.spec.checks import boolean, integer, positive_int, shown, token_count
from headwise.spec.dtypes import Dtype, bytes_per_element

Decay = Literal["fixed", "head", "dim"]

_RECURRENT_BYTES = 4
# The names in the field, by the delta rule and the decay.
_NAMES: dict[tuple[bool, Decay], str] = {
    (True, "head"): "gated delta rule",
    (True, "dim"): "Kimi delta attention",
    (False, "head"): "state-space duality",
    (False, "dim"): "gated linear attention",
    (False, "fixed"): "retention",
}
# Of one element of the matrices at one token: its decay, and two multiply-adds, the update and the
# product with the query. The delta rule has the product with the key as well.
_FLOPS, _DELTA_FLOPS = 5, 2


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """The last inputs of a short convolution, and a matrix [D, V] for each value head.

    >>> state = StateSpec(conv_channels=8192, conv_width=4, heads=32, key_dim=128, value_dim=128)
    >>> state.nbytes(1, "bf16")
    2162688

    A short convolution by itself (LFM2) has no heads:

    >>> print(StateSpec(conv_channels=2048, conv_width=3))
    convolution 2048 channels, width 3

    And retention (RetNet) has no convolution:

    >>> print(StateSpec(heads=4, key_dim=64, value_dim=128, delta=False, decay="fixed"))
    retention 4 heads, state 64 x 128

    Args:
        conv_channels: channels of the convolution, those of query, key and value together (for
            Mamba-2 those of C, B and x); 0 where there is none.
        conv_width: inputs that it reaches over, all of which are kept, as Transformers does; the
            next step would do with one fewer.
        heads: value heads, each with a matrix; 0 where the convolution is all.
        key_dim: rows of that matrix (for Mamba-2 the size of the state).
        value_dim: its columns (the size of a head).
        delta: whether an update takes off what the matrix holds for its key (the delta rule);
            without it the state decays and is added to (Mamba-2).
        key_heads: heads of queries and keys (for Mamba-2 the groups of B and C), each of which
            heads / key_heads value heads share; 0: as many as heads.
        decay: "fixed" is a constant of each head, "head" one number of each head and token, "dim"
            one of each row of the matrix and token.

    Raises:
        SpecError: a number below 1, or some of the matrices' or the convolution's numbers without
            the others; key heads that do not divide the heads; a delta rule whose decay is fixed.

    Sources: Gated DeltaNet, https://arxiv.org/abs/2412.06464; Kimi Linear,
    https://arxiv.org/abs/2510.26692; Mamba-2, https://arxiv.org/abs/2405.21060; gated linear
    attention, https://arxiv.org/abs/2312.06635; RetNet, https://arxiv.org/abs/2307.08621.
    """

    conv_channels: int = 0
    conv_width: int = 0
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    delta: bool = True
    key_heads: int = 0
    decay: Decay = "head"

    def __post_init__(self) -> None:
        convolution, matrices = ("conv_channels", "conv_width"), ("heads", "key_dim", "value_dim")
        has_matrices = any(getattr(self, name) != 0 for name in matrices)
        has_convolution = any(getattr(self, name) != 0 for name in convolution)
        for name in (
            *(convolution if has_convolution or not has_matrices else ()),
            *(matrices if has_matrices else ()),
        ):
            positive_int(name, getattr(self, name))
        boolean("delta", self.delta)
        if self.decay not in get_args(Decay):
            raise SpecError(f"decay={shown(self.decay)}: expected 'fixed', 'head' or 'dim'")
        if (self.delta, self.decay) not in _NAMES:
            raise SpecError("decay='fixed' with delta=True: expected delta=False, as in RetNet")
        integer("key_heads", self.key_heads, least=0)
        if self.key_heads and (not self.heads or self.heads % self.key_heads):
            raise SpecError(
                f"key_heads={self.key_heads} with heads={self.heads}: expected heads that are a "
                "multiple of key_heads"
            )
        if self.key_heads == self.heads:  # one spelling of the same: they follow the heads
            object.__setattr__(self, "key_heads", 0)

    @classmethod
    def mamba2(cls, *, heads: int, groups: int, key_dim: int, value_dim: int, width: int) -> Self:
        """Of a Mamba-2 layer, whose convolution is over x and, one a group of heads, B and C."""
        return cls(
            conv_channels=heads * value_dim + 2 * groups * key_dim,
            conv_width=width,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            delta=False,
            key_heads=groups,
        )

    @property
    def query_heads(self) -> int:
        """Heads of queries and keys."""
        return self.key_heads or self.heads

    @property
    def matrix_elements(self) -> int:
        """Elements of the matrices of all heads."""
        return self.heads * self.key_dim * self.value_dim

    def nbytes(self, batch: int = 1, dtype: Dtype = "bfloat16") -> int:
        """Bytes for `batch` sequences: the inputs in `dtype`, the matrices in float32.

        Raises:
            ShapeError: a `batch` below 1.
            SpecError: an unknown dtype.
        """
        token_count("batch", batch, least=1)
        inputs = self.conv_channels * self.conv_width * bytes_per_element(dtype)
        return batch * (inputs + self.matrix_elements * _RECURRENT_BYTES)

    def cache_bytes(self, context: int, batch: int = 1, dtype: Dtype = "bfloat16") -> int:
        """`nbytes`, whatever the context."""
        return self.nbytes(batch, dtype)

    def flops(self, query_length: int, context: int) -> int:
        """Operations of the recurrence over `query_length` tokens, whatever came before.

        Those of the convolution are not counted: its filters are weights.
        """
        each = _FLOPS + (_DELTA_FLOPS if self.delta else 0)
        return each * query_length * self.matrix_elements

    def __str__(self) -> str:
        if not self.heads:
            return f"convolution {self.conv_channels} channels, width {self.conv_width}"
        name, state = _NAMES[self.delta, self.decay], f"{self.key_dim} x {self.value_dim}"
        heads = f"/{self.key_heads}" if self.key_heads else ""
        return f"{name} {self.heads}{heads} heads, state {state}"
