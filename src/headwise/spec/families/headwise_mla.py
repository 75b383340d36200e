"""headwise's own family: Llama-like models whose attention was converted to MLA."""

from collections.abc import Sequence

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import integer, shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import split_hidden
from headwise.spec.config.layout import Layout, one_stack

_DEFAULTS: dict[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
}


def _read(fields: ConfigFields) -> Layout:
    heads, kv_heads = fields.positive("num_attention_heads"), fields.raw("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise SpecError(
            f"num_key_value_heads={shown(kv_heads)} with num_attention_heads={heads}: the latent "
            "is expanded to one key per query head; leave num_key_value_heads out"
        )
    dim = fields.optional_positive("head_dim") or split_hidden(fields)
    max_context = fields.positive("max_position_embeddings")
    ranks = _each_layer(fields, "kv_lora_rank", least=1)
    ropes = _each_layer(fields, "qk_rope_head_dim", least=2)
    nopes = _each_layer(fields, "qk_nope_head_dim", least=0)
    for rope in ropes:
        if rope % 2:
            raise SpecError(f"qk_rope_head_dim has {rope}: expected even numbers, pairs of dims")
    for nope in nopes:
        if nope not in (0, dim):
            raise SpecError(
                f"qk_nope_head_dim has {nope} with head_dim={dim}: expected head_dim, or 0 where "
                "every key is rotated"
            )
    value_dim, scale = fields.positive("v_head_dim"), fields.number("attention_scale")
    attentions = [
        AttentionSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            value_dim=value_dim,
            scale=scale,
            latent_rank=rank,
            rope_dim=rope,
        )
        for rank, rope, nope in zip(ranks, ropes, nopes, strict=True)
    ]
    return one_stack(attentions, max_context)


def _each_layer(fields: ConfigFields, name: str, *, least: int) -> list[int]:
    """A list of one integer a layer."""
    layers, values = fields.layers("num_hidden_layers"), fields.raw(name)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != layers:
        raise SpecError(
            f"{name}={shown(values)}: expected a list of {layers} integers, one a layer"
        )
    return [integer(name, value, least=least) for value in values]


HEADWISE_MLA = Family(
    model_type="headwise_mla",
    read=_read,
    defaults=_DEFAULTS,
    expands="linear",
)
