"""gpt-oss: grouped kv heads, a learned sink per head, a window in every other layer."""

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import grouped_stack, nth_full


def _read(fields: ConfigFields) -> Layout:
    windows = nth_full(fields, 2, fields.optional_positive("sliding_window"))
    return grouped_stack(fields, windows, sinks=True)


GPT_OSS = Family(
    model_type="gpt_oss",
    read=_read,
    defaults={
        "hidden_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": None,
        "max_position_embeddings": 131072,
    },
    copies=True,
    layer=DecoderLayer(
        name="GptOssDecoderLayer", rotation="halves once", sinks="sinks", routes=True
    ),
)
