"""Layers at the end of a model that read the keys and values of earlier layers (Gemma 3n, 4)."""

from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.config.layout import Layout


def share_keys(layout: Layout, count: int) -> Layout:
    """The layout with its last `count` layers reading the last layer of their kind before these.

    Layers are of one kind that have the same window.

    >>> from headwise.spec.attention import AttentionSpec
    >>> from headwise.spec.config.layout import one_stack
    >>> spec = AttentionSpec(heads=2, kv_heads=1, head_dim=8, value_dim=8)
    >>> layers = share_keys(one_stack([spec] * 3, max_context=512), 1).layers
    >>> [layer.shares for layer in layers]
    [None, None, 1]

    Raises:
        SpecError: there is none.
    """
    windows = [
        None if layer.attention is None else layer.attention.window for layer in layout.layers
    ]
    own = max(0, len(windows) - count)
    shared = tuple(
        replace(layer, shares=_last_of_kind(windows[:own], windows[layer.index], layer.index))
        for layer in layout.layers[own:]
    )
    return layout._replace(layers=layout.layers[:own] + shared)


def _last_of_kind(windows: list[int | None], window: int | None, index: int) -> int:
    if window not in windows:
        raise SpecError(
            f"num_kv_shared_layers: layer {index} (window {window}) shares keys and values, and no "
            "earlier layer of its kind has any; lower num_kv_shared_layers"
        )
    return len(windows) - 1 - windows[::-1].index(window)
