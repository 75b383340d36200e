"""PaLM: one kv head in every layer. Transformers has no such model; the fields are named as there.

Source: https://arxiv.org/abs/2204.02311 (section 2 and table 1).
"""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.layout import Layout, one_stack


def _read(fields: ConfigFields) -> Layout:
    head_dim = fields.positive("head_dim")
    attention = AttentionSpec(
        heads=fields.positive("num_attention_heads"),
        kv_heads=1,
        head_dim=head_dim,
        value_dim=head_dim,
    )
    layers = fields.layers("num_hidden_layers")
    return one_stack([attention] * layers, fields.positive("max_position_embeddings"))


PALM = Family(_read, defaults={})
