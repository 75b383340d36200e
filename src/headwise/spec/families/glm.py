"""GLM-4 9B, GLM-4 32B, GLM-4.5 to 4.7, and the text parts of GLM-4.1V and 4.5V."""

from typing import Any

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import split_hidden
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack, read_full

_GLM4V = LLAMA_DEFAULTS | {
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
_GLM = _GLM4V | {"head_dim": 128, "max_position_embeddings": 131072}
_GLM4_MOE = LLAMA_DEFAULTS | {
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_GLM4V_MOE = _GLM4_MOE | {"max_position_embeddings": 65536}


def _read_moe(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, head_dim=_head_dim(fields), qk_norm=fields.flag("use_qk_norm"))


def _read_4v_moe(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, head_dim=_head_dim(fields))


def _head_dim(fields: ConfigFields) -> int:
    # Rounded down, as in Transformers, whose default of 96 heads does not divide the hidden size.
    size, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    return fields.optional_positive("head_dim") or size // heads


def _read_4v(fields: ConfigFields) -> Layout:
    # Its module does not look at a head_dim.
    return grouped_stack(fields, head_dim=split_hidden(fields))


_FUSED: Any = {
    "rotation": "neighbours",
    "gate": "gate_up_proj",
    "up": "gate_up_proj",
    "activation": "activation_fn",
}

GLM = Family(
    model_type="glm",
    read=read_full,
    defaults=_GLM,
    interleaved_rope=True,
    partial_rope=True,
    layer=DecoderLayer(name="GlmDecoderLayer", **_FUSED),
)
GLM4 = Family(
    model_type="glm4",
    read=read_full,
    defaults=_GLM,
    interleaved_rope=True,
    partial_rope=True,
    layer=DecoderLayer(
        name="Glm4DecoderLayer",
        after_attention="post_self_attn_layernorm",
        after_mlp="post_mlp_layernorm",
        **_FUSED,
    ),
)
GLM4_MOE = Family(
    model_type="glm4_moe",
    read=_read_moe,
    defaults=_GLM4_MOE | {"use_qk_norm": False},
    partial_rope=True,
    layer=DecoderLayer(name="Glm4MoeDecoderLayer", head_norms=("q_norm", "k_norm")),
)
GLM4V_TEXT = Family(
    model_type="glm4v_text",
    read=_read_4v,
    defaults=_GLM4V,
    decoder_class="Glm4vTextModel",
    interleaved_rope=True,
    partial_rope=True,
)
GLM4V_MOE_TEXT = Family(
    model_type="glm4v_moe_text",
    read=_read_4v_moe,
    defaults=_GLM4V_MOE,
    decoder_class="Glm4vMoeTextModel",
    partial_rope=True,
)
GLM4V = Composite(model_type="glm4v", text="glm4v_text")
GLM46V = Composite(model_type="glm46v", text="glm4v_text")
GLM4V_MOE = Composite(model_type="glm4v_moe", text="glm4v_moe_text")
