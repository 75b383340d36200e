"""What a reader returns: layers, sorted into decoder and encoder, and the context limit."""

from collections.abc import Sequence
from typing import NamedTuple

from headwise.spec.attention import AttentionSpec
from headwise.spec.layer import LayerSpec


class Layout(NamedTuple):
    """The layers of a model and the tokens that it takes (None: no limit)."""

    layers: tuple[LayerSpec, ...]
    encoder_layers: tuple[LayerSpec, ...]
    max_context: int | None


def one_stack(
    attentions: Sequence[AttentionSpec],
    max_context: int | None,
    cross: Sequence[AttentionSpec] | None = None,
) -> Layout:
    """Lay out a model of one stack: a decoder when its layers are cached, else an encoder.

    >>> spec = AttentionSpec(heads=2, kv_heads=2, head_dim=8, value_dim=8, causal=False)
    >>> layout = one_stack([spec] * 3, max_context=512)
    >>> len(layout.layers), len(layout.encoder_layers)
    (0, 3)
    """
    layers = tuple(
        LayerSpec(index, attention, None if cross is None else cross[index])
        for index, attention in enumerate(attentions)
    )
    if attentions[0].cached:
        return Layout(layers, (), max_context)
    return Layout((), layers, max_context)
