"""The layers of a model that are equal but for their index, and what they cache."""

from dataclasses import dataclass

from headwise.planning.workload import Workload
from headwise.spec import LayerSpec, ModelSpec, StateSpec


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are equal but for their index.

    `cached_tokens` and `bytes` are those of all these layers for one sequence at the context.
    """

    stack: str
    layers: tuple[int, ...]
    attention: str
    mechanism: str
    heads: int | None
    kv_heads: int | None
    bytes_per_token: int
    cached_tokens: int
    bytes: int


def layer_groups(spec: ModelSpec, one: Workload) -> tuple[LayerGroup, ...]:
    """The groups of the encoder, then those of the decoder; `one` is a workload of one sequence."""
    encoder = [_group("encoder", *group, one) for group in spec.encoder_groups()]
    return (*encoder, *(_group("decoder", *group, one) for group in spec.layer_groups()))


def mechanism_of(layer: LayerSpec) -> str:
    """The mechanism of a layer: "GQA", ..., or what it does instead of attending."""
    if isinstance(layer.mixer, StateSpec):
        return "linear" if layer.mixer.heads else "convolution"
    return "none" if layer.attention is None else layer.attention.mechanism


def _group(stack: str, layer: LayerSpec, indices: tuple[int, ...], one: Workload) -> LayerGroup:
    attention, count = layer.attention, len(indices)
    return LayerGroup(
        stack=stack,
        layers=indices,
        attention=str(layer),
        mechanism=mechanism_of(layer),
        heads=None if attention is None else attention.heads,
        kv_heads=None if attention is None else attention.kv_heads,
        bytes_per_token=one.cache.token_bytes(layer) * count,
        cached_tokens=layer.cached.cached_tokens(one.context) if layer.cached else 0,
        bytes=one.layer_bytes(layer) * count if stack == "decoder" else 0,
    )
