"""Granite: GQA whose score factor is a field; with windows and sinks; beside Mamba-2 layers."""

from headwise.errors import SpecError
from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack
from headwise.spec.config.windows import layer_kinds, layer_windows
from headwise.spec.layer import LayerSpec
from headwise.spec.state import StateSpec

_GRANITE = LLAMA_DEFAULTS | {"attention_multiplier": 1.0}
_MOE_SWA = _GRANITE | {"sliding_window": 128, "layer_types": None}
_SWA = _MOE_SWA | {
    "hidden_size": 2560,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
_HYBRID = _GRANITE | {
    "layer_types": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_KINDS = ("linear_attention", "full_attention")


def _read(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, scale=fields.number("attention_multiplier"))


def _read_swa(fields: ConfigFields) -> Layout:
    # The first of every four layers is full, not the last.
    slides = [index % 4 != 0 for index in range(fields.layers("num_hidden_layers"))]
    windows = layer_windows(fields, fields.optional_positive("sliding_window"), default=slides)
    scale = fields.number("attention_multiplier")
    return grouped_stack(fields, windows, scale=scale, sinks=True)


def _read_hybrid(fields: ConfigFields) -> Layout:
    layers = fields.layers("num_hidden_layers")
    kinds = layer_kinds(fields, layers, known=_KINDS) or ["linear_attention"] * layers
    attention = grouped_heads(fields, scale=fields.number("attention_multiplier"))
    state = _state(fields)
    mixers = [attention if kind == "full_attention" else state for kind in kinds]
    return Layout(
        tuple(LayerSpec(index, mixer) for index, mixer in enumerate(mixers)),
        (),
        fields.positive("max_position_embeddings"),
    )


def _state(fields: ConfigFields) -> StateSpec:
    inner = fields.positive("mamba_expand") * fields.positive("hidden_size")
    heads, key_dim = fields.positive("mamba_n_heads"), fields.positive("mamba_d_state")
    size, groups = fields.raw("mamba_d_head"), fields.positive("mamba_n_groups")
    value_dim = inner // heads if size == "auto" else fields.positive("mamba_d_head")
    if heads * value_dim != inner:
        raise SpecError(
            f"mamba_n_heads={heads} with mamba_d_head={value_dim}: expected heads that add up to "
            f"mamba_expand x hidden_size = {inner}"
        )
    width = fields.positive("mamba_d_conv")
    return StateSpec.mamba2(
        heads=heads, groups=groups, key_dim=key_dim, value_dim=value_dim, width=width
    )


GRANITE = Family(
    model_type="granite",
    read=_read,
    defaults=_GRANITE,
    layer=DecoderLayer(name="GraniteDecoderLayer", scale="residual_multiplier"),
)
GRANITEMOE = Family(
    model_type="granitemoe",
    read=_read,
    defaults=_GRANITE,
    layer=DecoderLayer(
        name="GraniteMoeDecoderLayer", scale="residual_multiplier", mlp="block_sparse_moe"
    ),
)
GRANITEMOESHARED = Family(model_type="granitemoeshared", read=_read, defaults=_GRANITE)
GRANITE_SWA = Family(model_type="granite_swa", read=_read_swa, defaults=_SWA)
GRANITEMOE_SWA = Family(model_type="granitemoe_swa", read=_read_swa, defaults=_MOE_SWA)
GRANITEMOEHYBRID = Family(
    model_type="granitemoehybrid",
    read=_read_hybrid,
    defaults=_HYBRID,
    aliases={"layers_block_type": "layer_types"},
)
