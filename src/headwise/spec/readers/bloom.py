"""Bloom: MHA with ALiBi."""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.heads import split_hidden
from headwise.spec.readers.layout import Layout, one_stack


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("n_head"), split_hidden(fields, heads="n_head")
    attention = AttentionSpec(
        heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, alibi=True
    )
    return one_stack([attention] * fields.layers("n_layer"), None)


BLOOM = Family(
    _read,
    defaults={"hidden_size": 64, "n_layer": 2, "n_head": 8},
    aliases={
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
)
