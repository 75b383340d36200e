"""Cohere (Command R) and Cohere 2 (Command R7B and A): in the second, windows in 3 of 4 layers.

Full layers of Cohere 2 do not rotate their keys, which changes nothing that is cached.
"""

from typing import Any

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack, nth_full
from headwise.spec.config.windows import layer_windows

_COHERE2 = LLAMA_DEFAULTS | {
    "hidden_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}
_COHERE2_MOE = _COHERE2 | {
    "head_dim": 128,
    "first_k_dense_replace": 0,
    "prefix_dense_sliding_window_pattern": 1,
}
_NO_COHERE = ("sliding_window", "sliding_window_pattern", "layer_types")
_COHERE = {name: value for name, value in _COHERE2.items() if name not in _NO_COHERE}


# One norm, whose output both attention and MLP are given.
_PARALLEL: Any = {
    "norm": "layer",
    "before_mlp": "input_layernorm",
    "parallel": True,
    "rotation": "neighbours twice",
}


def _read(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, qk_norm=fields.optional_flag("use_qk_norm"))


def _read_cohere2(fields: ConfigFields) -> Layout:
    window, nth = _window(fields)
    return grouped_stack(fields, nth_full(fields, nth, window))


def _read_cohere2_moe(fields: ConfigFields) -> Layout:
    """The dense layers before the others have a pattern of their own, which starts at each."""
    window, nth = _window(fields)
    layers = fields.layers("num_hidden_layers")
    dense = min(fields.whole("first_k_dense_replace"), layers)
    dense_nth = fields.positive("prefix_dense_sliding_window_pattern")
    slides = [(index + 1) % dense_nth != 0 for index in range(dense)]
    slides += [(index + 1) % nth != 0 for index in range(layers - dense)]
    return grouped_stack(fields, layer_windows(fields, window, default=slides))


def _window(fields: ConfigFields) -> tuple[int | None, int]:
    return fields.optional_positive("sliding_window"), fields.positive("sliding_window_pattern")


COHERE = Family(
    model_type="cohere",
    read=_read,
    defaults=_COHERE | {"use_qk_norm": False},
    interleaved_rope=True,
    layer=DecoderLayer(name="CohereDecoderLayer", **_PARALLEL),
)
COHERE2_VISION = Composite(model_type="cohere2_vision", text="cohere2")
COHERE2 = Family(
    model_type="cohere2",
    read=_read_cohere2,
    defaults=_COHERE2,
    interleaved_rope=True,
    layer=DecoderLayer(name="Cohere2DecoderLayer", rotates="sliding_window", **_PARALLEL),
)
COHERE2_MOE = Family(
    model_type="cohere2_moe",
    read=_read_cohere2_moe,
    defaults=_COHERE2_MOE,
    interleaved_rope=True,
)
