"""What a decode step and a prefill read and compute: weights and attention, by the specs alone."""

from dataclasses import dataclass, replace

from headwise.planning.weights import Weights
from headwise.planning.workload import Workload
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec
from headwise.spec.dtypes import bytes_per_element


@dataclass(frozen=True)
class Cost:
    """Bytes that have to be read or written, and operations, 2 per multiply-add."""

    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.cache_bytes


def decode_cost(spec: ModelSpec, weights: Weights, workload: Workload) -> Cost:
    """One token for each sequence, on caches that then hold `context` tokens each.

    Each weight is read once for the batch, of a mixture of experts those that are expected to be
    chosen; each cached token once for its sequence. MLA counts as it is decoded, absorbed.
    """
    layers, batch = [layer_cost(layer, workload) for layer in spec.layers], workload.batch
    read = sum(nbytes for nbytes, _ in layers)
    flops = 2 * weights.active + sum(operations for _, operations in layers)
    weight_bytes = weights.read(batch) * bytes_per_element(workload.cache.dtype)
    return Cost(weight_bytes, batch * read, batch * flops)


def prefill_cost(spec: ModelSpec, weights: Weights, workload: Workload) -> Cost:
    """`context` tokens of each sequence in one pass, and the writing of their cache.

    Of an encoder-decoder: the encoder's tokens and the first token of the decoder. Logits are made
    for the last token only.
    """
    encoded, batch = workload.encoder_context, workload.batch
    source, prompt = encoded or workload.context, 1 if spec.encoder_layers else workload.context
    flops = 2 * (prompt * (weights.active - weights.head) + weights.head)
    flops += 2 * encoded * (weights.encoder + weights.cross)
    flops += sum(layer.flops(source, source) for layer in spec.encoder_layers)
    flops += sum(layer.flops(prompt, prompt, encoded) for layer in spec.layers)
    written = replace(workload, context=prompt).cache_bytes(spec)
    read = weights.read(batch * prompt) + weights.encoder + weights.cross
    return Cost(read * bytes_per_element(workload.cache.dtype), written, batch * flops)


def layer_cost(layer: LayerSpec, workload: Workload) -> tuple[float, float]:
    """Bytes and operations of one layer in a decode step of one sequence."""
    mixer, cache, context = layer.mixer, workload.cache, workload.context
    read = flops = 0.0
    if not isinstance(mixer, AttentionSpec):  # a state is read and written
        read, flops = 2 * mixer.cache_bytes(context, 1, cache.dtype), mixer.flops(1, context)
    elif mixer.cached:
        read = mixer.pairs(1, context) * cache.row_bytes(mixer)
        read += context * (cache.index_bytes(mixer) + workload.sketch_bytes(layer))
        flops = mixer.decoded().flops(1, context)
    if layer.cross_attention is not None:
        read += workload.encoder_context * cache.row_bytes(layer.cross_attention)
        flops += layer.cross_attention.flops(1, workload.encoder_context)
    return read, flops
