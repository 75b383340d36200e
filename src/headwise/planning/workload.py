"""What a model is asked to do: sequences of a length, cached in a format."""

from dataclasses import dataclass, replace

from headwise.errors import OptionError
from headwise.ops import row_bytes
from headwise.planning.cached import CacheFormat
from headwise.spec import LayerSpec, ModelSpec
from headwise.spec.checks import shown

# Where positions set no limit, the length that T5 was trained with.
_NO_LIMIT = 512
# Above any context that is asked for.
MOST_TOKENS = 2**40
_MOST_BYTES = 2**56


@dataclass(frozen=True)
class Workload:
    """Sequences that a model reads, and the format of their cache.

    Args:
        cache: how the tokens are held.
        context: tokens of each sequence.
        batch: sequences.
        encoder_context: the encoder's tokens of each sequence, 0 without cross-attention.
    """

    cache: CacheFormat
    context: int
    batch: int = 1
    encoder_context: int = 0

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        cache: CacheFormat,
        *,
        context: int | None = None,
        batch: int = 1,
        encoder_context: int | None = None,
    ) -> "Workload":
        """For a model: its limit as `context`, and `context` as `encoder_context` by default.

        Raises:
            OptionError: a number that is out of range, or an encoder that the model does not have.
        """
        if context is None:
            context = spec.max_context or _NO_LIMIT
            if context > MOST_TOKENS:
                raise OptionError(
                    f"{spec.family} takes {context:,} tokens by its config, more than can be "
                    "planned for: give a context"
                )
        _check("context", context)
        _check("batch", batch)
        if spec.has_cross_attention:
            encoder_context = context if encoder_context is None else encoder_context
            _check("encoder_context", encoder_context)
        elif encoder_context is not None:
            raise OptionError(
                f"encoder_context is {encoder_context}, and {spec.family} has no cross-attention: "
                "leave it out"
            )
        workload = cls(cache, context, batch, encoder_context or 0)
        per_token = max(1, replace(workload, batch=1).cache_bytes(spec) // context)
        if batch * max(context, workload.encoder_context) * per_token > _MOST_BYTES:
            raise OptionError(
                f"a cache of {batch:,} x {context:,} tokens takes more bytes than can be counted; "
                "give less"
            )
        return workload

    def sketch_bytes(self, layer: LayerSpec) -> int:
        """Bytes that a token adds to the sketch of a layer which chooses, 0 where it does not."""
        attention = layer.attention
        sparse = None if attention is None else attention.sparse
        if attention is None or sparse is None or self.context <= sparse.least:
            return 0
        return attention.kv_heads * row_bytes(attention.head_dim, 4)

    def held_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the caches of all layers, and of the sketches beside them."""
        sketches = 0 if self.cache.bits == 4 else sum(map(self.sketch_bytes, spec.layers))
        return self.cache_bytes(spec) + self.batch * self.context * sketches

    def cache_bytes(self, spec: ModelSpec) -> int:
        """Bytes that the caches of all layers need."""
        return sum(map(self.layer_bytes, spec.layers))

    def layer_bytes(self, layer: LayerSpec) -> int:
        """Bytes that the cache of one layer needs."""
        total = 0
        if layer.cached is not None:
            total += layer.cached.cached_tokens(self.context) * self.cache.token_bytes(layer)
        elif layer.shares is None:
            total += layer.mixer.cache_bytes(self.context, 1, self.cache.dtype)
        if layer.cross_attention is not None:
            total += self.encoder_context * self.cache.row_bytes(layer.cross_attention)
        return self.batch * total


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise OptionError(f"{name} is {shown(value)}, expected an int from 1 to {MOST_TOKENS:,}")
