"""Falcon in its three layouts: 7B (MQA), 40B and 180B (grouped kv heads), RW (MHA with ALiBi)."""

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import key_value_heads, split_hidden
from headwise.spec.config.layout import Layout, one_stack


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("num_attention_heads"), split_hidden(fields)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        value_dim=head_dim,
        alibi=fields.optional_flag("alibi"),
    )
    layers = fields.layers("num_hidden_layers")
    return one_stack([attention] * layers, fields.positive("max_position_embeddings"))


def _kv_heads(fields: ConfigFields, heads: int) -> int:
    if fields.optional_flag("new_decoder_architecture"):
        return key_value_heads(fields, heads, "num_kv_heads")
    # Falcon-7B's config says num_kv_heads=71 and multi_query=true; the second one holds.
    if fields.optional_flag("multi_query"):
        return 1
    kv_heads = fields.optional_positive("num_kv_heads")
    if kv_heads not in (None, heads):
        raise SpecError(
            f"num_kv_heads={kv_heads} with multi_query=False and new_decoder_architecture=False: "
            f"that layout has num_attention_heads={heads} kv heads; "
            "leave it out or set new_decoder_architecture=True"
        )
    return heads


def _stock_kv_heads(fields: ConfigFields) -> int | None:
    """The newer architecture repeats keys and values to all query heads, then caches them."""
    heads = fields.positive("num_attention_heads")
    repeats = fields.optional_flag("new_decoder_architecture") and heads > _kv_heads(fields, heads)
    return heads if repeats else None


FALCON = Family(
    model_type="falcon",
    read=_read,
    stock_kv_heads=_stock_kv_heads,
    defaults={
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "max_position_embeddings": 2048,
    },
    aliases={"n_embed": "hidden_size"},
)
