"""What a layer of linear attention keeps instead of a cache: a state whose size never changes."""

from dataclasses import dataclass

from headwise.spec.checks import positive_int, token_count
from headwise.spec.dtypes import Dtype, bytes_per_element

_RECURRENT_BYTES = 4
# Of one element of the matrices at one token: its decay, the products of key and query with it, and
# the update, two of which are multiply-adds.
_FLOPS = 7


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """The last inputs of a short convolution, and a matrix [D, V] for each value head.

    >>> state = StateSpec(conv_channels=8192, conv_width=4, heads=32, key_dim=128, value_dim=128)
    >>> state.nbytes(1, "bf16")
    2162688

    Args:
        conv_channels: channels of the convolution, those of query, key and value together.
        conv_width: inputs that it reaches over, all of which are kept, as Transformers does; the
            next step would do with one fewer.
        heads: value heads, each with a matrix.
        key_dim: rows of that matrix.
        value_dim: its columns.

    Raises:
        SpecError: a number below 1.

    Source: Gated DeltaNet, https://arxiv.org/abs/2412.06464.
    """

    conv_channels: int
    conv_width: int
    heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("conv_channels", "conv_width", "heads", "key_dim", "value_dim"):
            positive_int(name, getattr(self, name))

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
        """Operations of the recurrence over `query_length` tokens, whatever came before."""
        return _FLOPS * query_length * self.matrix_elements

    def __str__(self) -> str:
        return f"linear attention {self.heads} heads, state {self.key_dim} x {self.value_dim}"
