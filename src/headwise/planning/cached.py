"""How cached rows are stored: numbers of a dtype, or headwise's integers with their scales.

All that planning knows of caches by their names stands here.
"""

from dataclasses import dataclass

from headwise.caches import CacheChoice
from headwise.caches.choice import KINDS
from headwise.errors import OptionError, SpecError
from headwise.ops import Bits, row_bytes
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec
from headwise.spec.checks import shown
from headwise.spec.dtypes import bytes_per_element, dtype_name

_BITS = {name: kind.bits for name, kind in KINDS.items() if kind.bits is not None}
_SERVED = ("bfloat16", "float16", "float32")


def served_dtype(name: str) -> str | None:
    """The dtype that a name stands for, None where `attach` does not serve it.

    >>> served_dtype("bf16"), served_dtype("float64")
    ('bfloat16', None)
    """
    try:
        dtype = dtype_name(name)
    except SpecError:
        return None
    return dtype if dtype in _SERVED else None


@dataclass(frozen=True)
class CacheFormat:
    """What holds the cache.

    Args:
        dtype: of the model's numbers.
        bits: of the integers that rows are rounded to, None where they keep `dtype`.

    >>> spec = AttentionSpec(heads=32, kv_heads=8, head_dim=128, value_dim=128)
    >>> CacheFormat("bfloat16").row_bytes(spec), CacheFormat("bfloat16", 8).row_bytes(spec)
    (4096, 2112)
    """

    dtype: str
    bits: Bits | None = None

    @classmethod
    def parse(cls, text: str | None, dtype: str) -> "CacheFormat":
        """Of what `--cache-dtype` takes: int8, int4 or `dtype`, which is also that of None.

        Raises:
            OptionError: anything else.
        """
        if isinstance(text, str) and text in _BITS:
            return cls(dtype, _BITS[text])
        if text is None or (isinstance(text, str) and served_dtype(text) == dtype):
            return cls(dtype)
        raise OptionError(
            f"cache_dtype is {shown(text)}, expected {', '.join(_BITS)} or the model's own, "
            f"{dtype}: no cache has another"
        )

    @property
    def integers(self) -> str:
        """The name of the integers, as "int8"; "" where rows are in `dtype`."""
        return next((name for name, bits in _BITS.items() if bits == self.bits), "")

    @property
    def choice(self) -> CacheChoice:
        """The cache that `attach` makes of it."""
        return CacheChoice.parse(self.integers or "contiguous")

    def row_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of one token of one layer, an indexer's key not counted."""
        rows = spec.cache_rows
        # attach keeps the numbers of a window, and of an encoder
        numbers = spec.window is not None or spec.cross
        if self.bits is None or numbers:
            return rows.heads * sum(rows.dims) * bytes_per_element(self.dtype)
        return rows.heads * sum(row_bytes(dim, self.bits) for dim in rows.dims)

    def index_bytes(self, spec: AttentionSpec) -> int:
        """Bytes that one token's key takes in the cache of an indexer."""
        return spec.cache_rows.index_dim * bytes_per_element(self.dtype)

    def token_bytes(self, spec: ModelSpec | LayerSpec) -> int:
        """Bytes that one more token adds to a layer or to all, while below every window."""
        if isinstance(spec, ModelSpec):
            return sum(map(self.token_bytes, spec.layers))
        cached = spec.cached
        return 0 if cached is None else self.row_bytes(cached) + self.index_bytes(cached)
