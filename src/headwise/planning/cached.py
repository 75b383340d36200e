"""How cached rows are stored: numbers of a dtype, or headwise's integers with their scales."""

from dataclasses import dataclass

from headwise.caches import CacheChoice
from headwise.errors import OptionError
from headwise.ops import Bits, row_bytes
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec
from headwise.spec.checks import shown
from headwise.spec.dtypes import bytes_per_element

# What attach serves, by the names that people type.
NUMBERS = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
}
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class CacheFormat:
    """What holds the cache.

    Args:
        dtype: of the model's numbers.
        bits: 8 or 4 where rows are held as such integers with scales, None where in `dtype`.

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
        if text is None or (isinstance(text, str) and NUMBERS.get(text) == dtype):
            return cls(dtype)
        raise OptionError(
            f"cache_dtype is {shown(text)}, expected int8, int4 or the model's own, {dtype}: "
            "no cache has another"
        )

    @property
    def choice(self) -> CacheChoice:
        """The cache that `attach` makes of it."""
        return CacheChoice.parse("contiguous" if self.bits is None else f"int{self.bits}")

    def row_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of one token of one layer, an indexer's key not counted."""
        rows = spec.cache_rows
        # attach keeps the numbers of a window, of an encoder, and of what an indexer chooses from.
        numbers = spec.window is not None or spec.cross or spec.indexer is not None
        if self.bits is None or numbers:
            return rows.heads * sum(rows.dims) * bytes_per_element(self.dtype)
        return rows.heads * sum(row_bytes(dim, self.bits) for dim in rows.dims)

    def index_bytes(self, spec: AttentionSpec) -> int:
        """Bytes that one token's key takes in the cache of an indexer."""
        return spec.cache_rows.index_dim * bytes_per_element(self.dtype)

    def layer_bytes(
        self, layer: LayerSpec, context: int, batch: int = 1, encoder_context: int = 0
    ) -> int:
        """Bytes that a layer holds for `batch` sequences of `context` tokens."""
        total = 0
        if layer.cached is not None:
            token = self.row_bytes(layer.cached) + self.index_bytes(layer.cached)
            total += batch * layer.cached.cached_tokens(context) * token
        if layer.cross_attention is not None:
            total += batch * encoder_context * self.row_bytes(layer.cross_attention)
        if layer.attention is None:
            total += layer.mixer.cache_bytes(context, batch, self.dtype)
        return total

    def model_bytes(
        self, spec: ModelSpec, context: int, batch: int = 1, encoder_context: int = 0
    ) -> int:
        """Bytes that all layers hold."""
        return sum(
            self.layer_bytes(layer, context, batch, encoder_context) for layer in spec.layers
        )

    def token_bytes(self, spec: ModelSpec) -> int:
        """Bytes that one more token adds to all layers, while below every window."""
        cached = [layer.cached for layer in spec.layers if layer.cached is not None]
        return sum(self.row_bytes(at) + self.index_bytes(at) for at in cached)
