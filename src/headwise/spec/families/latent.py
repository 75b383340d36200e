"""Families whose layers are all DeepSeek's MLA, each with a change that the cache does not see."""

from typing import Any

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.latent import LATENT_DEFAULTS, latent_heads
from headwise.spec.config.layout import Layout, one_stack

_AXK1 = LATENT_DEFAULTS | {
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "max_position_embeddings": 32768,
}
_YOUTU = LATENT_DEFAULTS | {
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 131072,
}
_MISTRAL4 = LATENT_DEFAULTS | {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 1048576,
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_nope_head_dim": 64,
}
_LONGCAT = LATENT_DEFAULTS | {
    "num_layers": 28,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "max_position_embeddings": 131072,
    "qk_head_dim": None,
}
# What Mistral 4's config class puts where a config says nothing of its rotation.
_MISTRAL4_ROPE = {"rope_type": "yarn", "factor": 128.0, "mscale_all_dim": 1.0}


def _read(fields: ConfigFields) -> Layout:
    return _layout(fields, fields.layers("num_hidden_layers"))


def _read_mistral4(fields: ConfigFields) -> Layout:
    return _layout(fields, fields.layers("num_hidden_layers"), rope=_MISTRAL4_ROPE)


def _read_longcat(fields: ConfigFields) -> Layout:
    """Each of its decoder layers attends twice, and counts as two layers of the cache."""
    layers, given = 2 * fields.layers("num_layers"), fields.raw("num_hidden_layers")
    if given not in (None, layers):
        raise SpecError(
            f"num_hidden_layers={shown(given)} with num_layers={layers // 2}: every layer attends "
            "twice; leave num_hidden_layers out"
        )
    layout = _layout(fields, layers)
    attention = layout.layers[0].attention
    assert attention is not None
    if fields.raw("qk_head_dim") not in (None, attention.head_dim):
        raise SpecError(
            f"qk_head_dim={shown(fields.raw('qk_head_dim'))}: expected {attention.head_dim}, "
            "qk_nope_head_dim and qk_rope_head_dim together; leave it out"
        )
    return layout


def _layout(fields: ConfigFields, layers: int, **options: Any) -> Layout:
    max_context = fields.positive("max_position_embeddings")
    return one_stack([latent_heads(fields, **options)] * layers, max_context)


AXK1 = Family(model_type="axk1", read=_read, defaults=_AXK1, copies=True)
YOUTU = Family(model_type="youtu", read=_read, defaults=_YOUTU, copies=True)
MISTRAL4 = Family(
    model_type="mistral4",
    read=_read_mistral4,
    defaults=_MISTRAL4,
    decoder_class="Mistral4ForCausalLM",
)
LONGCAT_FLASH = Family(
    model_type="longcat_flash",
    read=_read_longcat,
    defaults=_LONGCAT,
    interleaved_rope=True,
)
