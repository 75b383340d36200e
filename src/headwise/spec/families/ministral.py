"""Ministral and Ministral 3; Mistral 3, a multimodal type whose text part is one or Mistral."""

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack, read_window
from headwise.spec.config.windows import layer_windows

_MINISTRAL = LLAMA_DEFAULTS | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}
_MINISTRAL3 = LLAMA_DEFAULTS | {
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "sliding_window": None,
}


def _read_ministral(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    slides = [window is not None] * fields.layers("num_hidden_layers")
    return grouped_stack(fields, layer_windows(fields, window, default=slides))


MINISTRAL = Family(
    model_type="ministral",
    read=_read_ministral,
    defaults=_MINISTRAL,
    layer=DecoderLayer(name="MinistralDecoderLayer"),
)
MINISTRAL3 = Family(model_type="ministral3", read=read_window, defaults=_MINISTRAL3)
MISTRAL3 = Composite(
    model_type="mistral3",
    text="mistral",
    alone={
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "sliding_window": None,
    },
)
