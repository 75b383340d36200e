"""GPT-2 (MHA) and GPT-BigCode (the same, with one shared kv head)."""

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import split_hidden
from headwise.spec.config.layout import Layout, one_stack

_DEFAULTS: dict[str, object] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "scale_attn_weights": True,
    "add_cross_attention": False,
}
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def _read_gpt2(fields: ConfigFields) -> Layout:
    return _read(
        fields,
        kv_heads=fields.positive("n_head"),
        by_depth=fields.flag("scale_attn_by_inverse_layer_idx"),
    )


def _read_gpt_bigcode(fields: ConfigFields) -> Layout:
    shared = fields.flag("multi_query")
    if shared and fields.flag("add_cross_attention"):
        raise SpecError(
            "add_cross_attention=True with multi_query=True: Transformers has no such layer; "
            "set one of them to False"
        )
    return _read(fields, kv_heads=1 if shared else fields.positive("n_head"), by_depth=False)


def _read(fields: ConfigFields, kv_heads: int, by_depth: bool) -> Layout:
    heads, head_dim = fields.positive("n_head"), split_hidden(fields, "n_embd", "n_head")
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights") else 1.0

    def attention(index: int, *, cross: bool = False) -> AttentionSpec:
        return AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=scale / (index + 1) if by_depth else scale,
            causal=not cross,
            cross=cross,
        )

    depth = range(fields.layers("n_layer"))
    cross = None
    if fields.flag("add_cross_attention"):
        cross = [attention(index, cross=True) for index in depth]
    return one_stack([attention(index) for index in depth], fields.positive("n_positions"), cross)


GPT2 = Family(
    model_type="gpt2",
    read=_read_gpt2,
    defaults=_DEFAULTS | {"scale_attn_by_inverse_layer_idx": False},
    aliases=_ALIASES,
)
GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    read=_read_gpt_bigcode,
    defaults=_DEFAULTS | {"multi_query": True},
    aliases=_ALIASES,
)
