"""Multi-head latent attention as the fields of DeepSeek's kin give it."""

import math
from collections.abc import Mapping

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import finite, shown
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import split_hidden

# The defaults of their config classes where these agree, as most do.
LATENT_DEFAULTS: dict[str, object] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": None,
    "rope_parameters": None,
}


def latent_heads(
    fields: ConfigFields,
    rope: Mapping[str, object] | None = None,
) -> AttentionSpec:
    """MLA with the fields of DeepSeek's kin, its scale with YaRN's factor.

    rope: the rotary settings of a config that has none, where these are not the plain ones.

    >>> config = {"num_attention_heads": 16, "q_lora_rank": None}
    >>> print(latent_heads(ConfigFields(config, defaults=LATENT_DEFAULTS)))
    MLA 16 heads, R 512 + P 64

    Raises:
        SpecError: a field that does not fit, or kv heads that are not the query heads.
    """
    heads, kv_heads = fields.positive("num_attention_heads"), fields.raw("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise SpecError(
            f"num_key_value_heads={shown(kv_heads)} with num_attention_heads={heads}: the latent "
            "is expanded to one key per query head; expected equal numbers"
        )
    rope_dim = fields.positive("qk_rope_head_dim")
    head_dim = fields.positive("qk_nope_head_dim") + rope_dim
    yarn = _yarn_factor(fields, rope)
    return AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=fields.optional_positive("v_head_dim") or split_hidden(fields),
        scale=head_dim**-0.5 * yarn * yarn,
        latent_rank=fields.positive("kv_lora_rank"),
        rope_dim=rope_dim,
        query_rank=fields.optional_positive("q_lora_rank"),
    )


def _yarn_factor(fields: ConfigFields, default: Mapping[str, object] | None) -> float:
    """What YaRN multiplies queries and keys by: 0.1 * mscale_all_dim * ln(factor) + 1.

    Source: https://arxiv.org/abs/2309.00071 (equation 22), applied as Transformers does.
    """
    # The published files say rope_scaling, files written by Transformers 5 rope_parameters.
    name = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    given = fields.raw(name)
    rope = (default if given is None else given) or {}
    if not isinstance(rope, Mapping):
        raise SpecError(f"{name}={shown(rope)}: expected a dict of rotary settings or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    strength = rope.get("mscale_all_dim", 0)
    if kind == "default" or not strength:
        return 1.0
    strength = finite(f"{name}.mscale_all_dim", strength)
    factor = finite(f"{name}.factor", rope.get("factor"))
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0
