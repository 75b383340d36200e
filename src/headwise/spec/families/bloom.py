"""Bloom: MHA with ALiBi."""

from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads, split_hidden
from headwise.spec.config.layout import Layout, one_stack


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("n_head"), split_hidden(fields, heads="n_head")
    attention = equal_heads(heads, head_dim, alibi=True)
    return one_stack([attention] * fields.layers("n_layer"), None)


BLOOM = Family(
    model_type="bloom",
    read=_read,
    defaults={"hidden_size": 64, "n_layer": 2, "n_head": 8},
    aliases={
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
)
