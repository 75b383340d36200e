"""What a decode step and a prefill read and compute: weights and attention, by the specs alone."""

from dataclasses import dataclass

from headwise.planning.cached import CacheFormat
from headwise.planning.weights import Weights
from headwise.spec import LayerSpec, ModelSpec
from headwise.spec.dtypes import bytes_per_element


@dataclass(frozen=True)
class Cost:
    """Bytes that have to be read or written, and operations, 2 a multiply-add."""

    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.cache_bytes


def decode_cost(
    spec: ModelSpec,
    weights: Weights,
    cache: CacheFormat,
    *,
    context: int,
    batch: int,
    dtype: str,
    encoder_context: int = 0,
) -> Cost:
    """One token for each of `batch` sequences, on caches that then hold `context` tokens each.

    Each weight is read once for the batch, of a mixture of experts those that are expected to be
    chosen; each cached token once for its sequence. MLA counts as it is decoded, absorbed.
    """
    read = flops = 0.0
    for layer in spec.layers:
        nbytes, done = _decode_layer(layer, cache, context, encoder_context)
        read += batch * nbytes
        flops += batch * done
    flops += 2 * batch * weights.active
    return Cost(weights.read(batch) * bytes_per_element(dtype), read, flops)


def prefill_cost(
    spec: ModelSpec,
    weights: Weights,
    cache: CacheFormat,
    *,
    context: int,
    batch: int,
    dtype: str,
    encoder_context: int = 0,
) -> Cost:
    """`context` tokens of each sequence in one pass, and the writing of their cache.

    Of an encoder-decoder: the encoder's tokens and the first token of the decoder. Logits are made
    for the last token only.
    """
    flops = 0.0
    for layer in spec.encoder_layers:
        tokens = encoder_context or context
        flops += batch * layer.flops(tokens, tokens)
    prompt = 1 if spec.encoder_layers else context
    for layer in spec.layers:
        flops += batch * layer.flops(prompt, prompt, encoder_context)
    written = sum(cache.layer_bytes(layer, prompt, batch, encoder_context) for layer in spec.layers)
    flops += 2 * batch * (prompt * (weights.active - weights.head) + weights.head)
    flops += 2 * batch * encoder_context * (weights.encoder + weights.cross)
    read = weights.read(batch * prompt) + weights.encoder + weights.cross
    return Cost(read * bytes_per_element(dtype), written, flops)


def _decode_layer(
    layer: LayerSpec, cache: CacheFormat, context: int, encoder_context: int
) -> tuple[float, float]:
    """Bytes and operations of one layer for one sequence."""
    nbytes = flops = 0.0
    if layer.attention is not None and layer.attention.cached:
        decoded = layer.attention.decoded()
        tokens = decoded.pairs(1, context)
        nbytes += tokens * cache.row_bytes(layer.attention)
        if layer.attention.indexer is not None:
            nbytes += context * cache.index_bytes(layer.attention)
        flops += decoded.flops(1, context)
    if layer.cross_attention is not None:
        nbytes += encoder_context * cache.row_bytes(layer.cross_attention)
        flops += layer.cross_attention.flops(1, encoder_context)
    if layer.attention is None:
        nbytes += 2 * layer.mixer.cache_bytes(context, 1, cache.dtype)
        flops += layer.mixer.flops(1, context)
    return nbytes, flops
