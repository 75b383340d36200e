"""PaLM: one kv head in every layer. Transformers has no such model; the fields are named as there.

Source: https://arxiv.org/abs/2204.02311 (section 2 and table 1).
"""

from headwise.spec.attention import AttentionSpec
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout, one_stack


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


def _weights(fields: ConfigFields) -> tuple[int, int]:
    """Query, shared key and value, output, a SwiGLU, and the tied embedding; section 2."""
    hidden, inner = fields.positive("hidden_size"), fields.positive("intermediate_size")
    heads, dim = fields.positive("num_attention_heads"), fields.positive("head_dim")
    layer = 2 * hidden * heads * dim + 2 * hidden * dim + 3 * hidden * inner + hidden
    head = fields.positive("vocab_size") * hidden
    return fields.positive("num_hidden_layers") * layer + head + hidden, head


PALM = Family(model_type="palm", read=_read, defaults={}, in_transformers=False, weights=_weights)
