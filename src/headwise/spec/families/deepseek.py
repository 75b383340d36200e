"""DeepSeek-V2 and V3 and kin: multi-head latent attention, with YaRN's factor in the scale."""

from dataclasses import replace

from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.latent import LATENT_DEFAULTS, latent_heads
from headwise.spec.config.layout import Layout, one_stack

_V2 = LATENT_DEFAULTS | {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_V3 = LATENT_DEFAULTS | {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
}
_GLM4_MOE_LITE = LATENT_DEFAULTS | {
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "max_position_embeddings": 202752,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}
_MINICPM3 = LATENT_DEFAULTS | {
    "hidden_size": 2560,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 32768,
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": None,
}


def _read(fields: ConfigFields) -> Layout:
    attention = latent_heads(fields)
    layers = fields.layers("num_hidden_layers")
    return one_stack([attention] * layers, fields.positive("max_position_embeddings"))


def _read_expanded(fields: ConfigFields) -> Layout:
    """Of a model that caches what MLA expands its latents to."""
    layout = _read(fields)
    (mla,) = {layer.attention for layer in layout.layers}
    assert mla is not None
    attention = replace(mla, latent_rank=None, rope_dim=None, query_rank=None)
    return one_stack([attention] * len(layout.layers), layout.max_context)


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    read=_read,
    defaults=_V2,
    interleaved_rope=True,
    expands="normalised",
    copies=True,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    read=_read,
    defaults=_V3,
    expands="normalised",
    copies=True,
)
DEEPSEEK_V2_MHA = Family(model_type="headwise_deepseek_v2_mha", read=_read_expanded, defaults=_V2)
DEEPSEEK_V3_MHA = Family(model_type="headwise_deepseek_v3_mha", read=_read_expanded, defaults=_V3)
GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    read=_read,
    defaults=_GLM4_MOE_LITE,
    partial_rope=True,
    copies=True,
)
MINICPM3 = Family(model_type="minicpm3", read=_read, defaults=_MINICPM3, copies=True)
