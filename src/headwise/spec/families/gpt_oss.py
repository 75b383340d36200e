"""gpt-oss: grouped kv heads, a learned sink per head, a window in every other layer."""

from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads, with_windows
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.config.windows import layer_windows


def _read(fields: ConfigFields) -> Layout:
    slides = [index % 2 == 0 for index in range(fields.layers("num_hidden_layers"))]
    windows = layer_windows(fields, fields.optional_positive("sliding_window"), default=slides)
    attentions = with_windows(grouped_heads(fields, sinks=True), windows)
    return one_stack(attentions, fields.positive("max_position_embeddings"))


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
)
