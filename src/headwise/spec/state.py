"""What a layer keeps instead of a cache: a state whose size never changes.

Of linear attention, of a state-space model (Mamba-2), or of a short convolution.
"""

from dataclasses import dataclass

from headwise.spec.checks import boolean, positive_int, token_count
from headwise.spec.dtypes import Dtype, bytes_per_element

_RECURRENT_BYTES = 4
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

    Args:
        conv_channels: channels of the convolution, those of query, key and value together (for
            Mamba-2 those of C, B and x).
        conv_width: inputs that it reaches over, all of which are kept, as Transformers does; the
            next step would do with one fewer.
        heads: value heads, each with a matrix; 0 where the convolution is all.
        key_dim: rows of that matrix (for Mamba-2 the size of the state).
        value_dim: its columns (the size of a head).
        delta: whether an update takes off what the matrix holds for its key (the delta rule);
            without it the state decays and is added to (Mamba-2).

    Raises:
        SpecError: a number below 1, or some of the matrices' numbers without the others.

    Sources: Gated DeltaNet, https://arxiv.org/abs/2412.06464; Mamba-2,
    https://arxiv.org/abs/2405.21060.
    """

    conv_channels: int
    conv_width: int
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    delta: bool = True

    def __post_init__(self) -> None:
        matrices = ("heads", "key_dim", "value_dim")
        has_any = any(getattr(self, name) != 0 for name in matrices)
        for name in ("conv_channels", "conv_width", *(matrices if has_any else ())):
            positive_int(name, getattr(self, name))
        boolean("delta", self.delta)

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
        name = "linear attention" if self.delta else "state space"
        return f"{name} {self.heads} heads, state {self.key_dim} x {self.value_dim}"
