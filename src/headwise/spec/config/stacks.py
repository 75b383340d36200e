"""Stacks with the fields of Llama's kin: full attention, a window in every layer, or both kinds."""

from collections.abc import Sequence
from typing import Any

from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads, with_windows
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.config.windows import layer_windows

# Of Transformers' config class for Llama, and of many that were written after it.
LLAMA_DEFAULTS: dict[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
}


def grouped_stack(
    fields: ConfigFields, windows: Sequence[int | None] | None = None, **options: Any
) -> Layout:
    """A decoder of `grouped_heads`, with one window per layer; left out, all attend to all.

    >>> layout = grouped_stack(ConfigFields(LLAMA_DEFAULTS), qk_norm=True)
    >>> print(len(layout.layers), layout.layers[0])
    32 MHA 32 heads, D 128, qk-norm
    """
    if windows is None:
        windows = [None] * fields.layers("num_hidden_layers")
    attentions = with_windows(grouped_heads(fields, **options), windows)
    return one_stack(attentions, fields.positive("max_position_embeddings"))


def read_full(fields: ConfigFields) -> Layout:
    """Every layer attends to all earlier tokens."""
    return grouped_stack(fields)


def read_normalised(fields: ConfigFields) -> Layout:
    """The same, with normalised queries and keys."""
    return grouped_stack(fields, qk_norm=True)


def read_window(fields: ConfigFields) -> Layout:
    """Every layer has the window `sliding_window`, if there is one."""
    window = fields.optional_positive("sliding_window")
    return grouped_stack(fields, [window] * fields.layers("num_hidden_layers"))


def nth_full(fields: ConfigFields, nth: int, window: int | None) -> list[int | None]:
    """The windows of layers of which every `nth` is full, unless layer_types says otherwise.

    >>> nth_full(ConfigFields({"num_hidden_layers": 4}), 2, window=128)
    [128, None, 128, None]
    """
    slides = [(index + 1) % nth != 0 for index in range(fields.layers("num_hidden_layers"))]
    return layer_windows(fields, window, default=slides)
