"""gpt-oss: grouped kv heads, a learned sink per head, a window in every other layer."""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.heads import key_value_heads, split_hidden
from headwise.spec.readers.layout import Layout, one_stack
from headwise.spec.readers.windows import layer_windows


def _read(fields: ConfigFields) -> Layout:
    heads = fields.positive("num_attention_heads")
    head_dim = fields.optional_positive("head_dim") or split_hidden(fields)
    slides = [index % 2 == 0 for index in range(fields.layers("num_hidden_layers"))]
    windows = layer_windows(fields, fields.optional_positive("sliding_window"), default=slides)
    attentions = [
        AttentionSpec(
            heads=heads,
            kv_heads=key_value_heads(fields, heads),
            head_dim=head_dim,
            value_dim=head_dim,
            window=window,
            sinks=True,
        )
        for window in windows
    ]
    return one_stack(attentions, fields.positive("max_position_embeddings"))


GPT_OSS = Family(
    _read,
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
