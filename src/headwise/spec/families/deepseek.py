"""DeepSeek-V2 and V3 and kin: multi-head latent attention, with YaRN's factor in the scale."""

import math
from collections.abc import Mapping
from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import finite, shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import split_hidden
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.indexer import IndexerSpec

_SHARED: dict[str, object] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": None,
    "rope_parameters": None,
}
_V2 = _SHARED | {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_V3 = _SHARED | {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
}
_V32 = _V3 | {
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
_GLM4_MOE_LITE = _SHARED | {
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "max_position_embeddings": 202752,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}
_MINICPM3 = _SHARED | {
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


def _read_v32(fields: ConfigFields) -> Layout:
    return _read(
        fields,
        IndexerSpec(
            heads=fields.positive("index_n_heads"),
            dim=fields.positive("index_head_dim"),
            topk=fields.positive("index_topk"),
        ),
    )


def _read(fields: ConfigFields, indexer: IndexerSpec | None = None) -> Layout:
    heads, kv_heads = fields.positive("num_attention_heads"), fields.raw("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise SpecError(
            f"num_key_value_heads={shown(kv_heads)} with num_attention_heads={heads}: the latent "
            "is expanded to one key per query head; expected equal numbers"
        )
    rope_dim = fields.positive("qk_rope_head_dim")
    head_dim = fields.positive("qk_nope_head_dim") + rope_dim
    yarn = _yarn_factor(fields)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=fields.optional_positive("v_head_dim") or split_hidden(fields),
        scale=head_dim**-0.5 * yarn * yarn,
        latent_rank=fields.positive("kv_lora_rank"),
        rope_dim=rope_dim,
        query_rank=fields.optional_positive("q_lora_rank"),
        indexer=indexer,
    )
    layers = fields.layers("num_hidden_layers")
    return one_stack([attention] * layers, fields.positive("max_position_embeddings"))


def _read_expanded(fields: ConfigFields) -> Layout:
    """Of a model that caches what MLA expands its latents to."""
    layout = _read(fields)
    (mla,) = {layer.attention for layer in layout.layers}
    assert mla is not None
    attention = replace(mla, latent_rank=None, rope_dim=None, query_rank=None)
    return one_stack([attention] * len(layout.layers), layout.max_context)


def _yarn_factor(fields: ConfigFields) -> float:
    """What YaRN multiplies queries and keys by: 0.1 * mscale_all_dim * ln(factor) + 1.

    Source: https://arxiv.org/abs/2309.00071 (equation 22), applied as Transformers does.
    """
    # The published files say rope_scaling, files written by Transformers 5 rope_parameters.
    name = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    rope = fields.raw(name) or {}
    if not isinstance(rope, Mapping):
        raise SpecError(f"{name}={shown(rope)}: expected a dict of rotary settings or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    strength = rope.get("mscale_all_dim", 0)
    if kind == "default" or not strength:
        return 1.0
    strength = finite(f"{name}.mscale_all_dim", strength)
    factor = finite(f"{name}.factor", rope.get("factor"))
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


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
DEEPSEEK_V32 = Family(model_type="deepseek_v32", read=_read_v32, defaults=_V32)
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
