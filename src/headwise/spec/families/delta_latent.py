"""Kimi Linear and Bailing Hybrid (Ling 3): layers of Kimi delta attention, and some of MLA."""

from collections.abc import Mapping
from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import integer, positive_int, shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.latent import LATENT_DEFAULTS, latent_heads
from headwise.spec.config.layout import Layout
from headwise.spec.config.windows import layer_kinds
from headwise.spec.layer import LayerSpec
from headwise.spec.state import StateSpec

_BOTH = LATENT_DEFAULTS | {
    "q_lora_rank": None,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "layer_types": None,
}
# Kimi's keys are not rotated, and its config has no field for it.
_KIMI = {name: value for name, value in _BOTH.items() if not name.startswith("rope")} | {
    "num_hidden_layers": 27,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
    "model_max_length": 1048576,
}
_BAILING = _BOTH | {
    "num_hidden_layers": 42,
    "head_dim": 128,
    "short_conv_kernel_size": 4,
    "layer_group_size": 6,
    "model_max_length": 262144,
}
# The one is a name of the other in Transformers, whose config writes only model_max_length.
_ALIASES = {"max_position_embeddings": "model_max_length"}
_KINDS = ("linear_attention", "full_attention")


def _read_kimi(fields: ConfigFields) -> Layout:
    layers, published = fields.layers("num_hidden_layers"), _published(fields)
    # what is published of the linear layers comes before what Transformers makes of it
    names = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"}
    names["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    dim, heads, width = (
        positive_int(f"linear_attn_config.{inner}", published[inner])
        if inner in published
        else fields.positive(name)
        for name, inner in names.items()
    )
    kinds = layer_kinds(fields, layers, known=_KINDS)
    if kinds is not None:
        full = [kind == "full_attention" for kind in kinds]
    elif "full_attn_layers" in published and "kda_layers" in published:
        full = _published_kinds(published, layers)
    else:
        full = [index > 0 and index % 4 == 0 for index in range(layers)]
    attention = latent_heads(fields)
    attention = replace(attention, scale=attention.head_dim**-0.5)  # whatever a rotation asks for
    return _layout(fields, full, attention, _state(dim, heads, width))


def _published(fields: ConfigFields) -> Mapping[str, object]:
    published = fields.raw("linear_attn_config")
    published = {} if published is None else published
    if not isinstance(published, Mapping):
        raise SpecError(f"linear_attn_config={shown(published)}: expected a dict")
    return published


def _published_kinds(published: Mapping[str, object], layers: int) -> list[bool]:
    """Which layers attend; the published lists count layers from 1."""
    attends: dict[int, bool] = {}
    for name, kind in (("full_attn_layers", True), ("kda_layers", False)):
        numbers, name = published[name], f"linear_attn_config.{name}"
        if not isinstance(numbers, list | tuple):
            raise SpecError(f"{name}={shown(numbers)}: expected a list of layers")
        attends |= {integer(name, number, least=1): kind for number in numbers}
    if sorted(attends) != list(range(1, layers + 1)):
        raise SpecError(
            f"linear_attn_config lists the layers {shown(sorted(attends))}: expected each of 1 to "
            f"{layers}, in full_attn_layers or kda_layers"
        )
    return [attends[number] for number in range(1, layers + 1)]


def _read_bailing(fields: ConfigFields) -> Layout:
    layers = fields.layers("num_hidden_layers")
    attention = latent_heads(fields)
    # a config that Transformers has written has another head_dim, and these beside it
    names = {"linear_head_dim": "head_dim", "linear_num_heads": "num_attention_heads"}
    names["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    dim, heads, width = (
        fields.positive(name if fields.raw(written) is None else written)
        for written, name in names.items()
    )
    kinds = layer_kinds(fields, layers, known=_KINDS)
    if kinds is None:
        group = fields.positive("layer_group_size")
        full = [(index + 1) % group == 0 for index in range(layers)]
    else:
        full = [kind == "full_attention" for kind in kinds]
    return _layout(fields, full, attention, _state(dim, heads, width))


def _state(dim: int, heads: int, width: int) -> StateSpec:
    return StateSpec(
        conv_channels=3 * heads * dim,
        conv_width=width,
        heads=heads,
        key_dim=dim,
        value_dim=dim,
        decay="dim",
    )


def _layout(
    fields: ConfigFields, full: list[bool], attention: AttentionSpec, state: StateSpec
) -> Layout:
    layers = tuple(
        LayerSpec(index, attention if attends else state) for index, attends in enumerate(full)
    )
    return Layout(layers, (), fields.positive("model_max_length"))


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    read=_read_kimi,
    defaults=_KIMI,
    aliases=_ALIASES,
)
BAILING_HYBRID = Family(
    model_type="bailing_hybrid",
    read=_read_bailing,
    defaults=_BAILING,
    aliases=_ALIASES,
    interleaved_rope=True,
)
