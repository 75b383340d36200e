"""LFM2 and its MoE: short convolutions, with a layer of attention now and then."""

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout
from headwise.spec.config.windows import layer_kinds
from headwise.spec.layer import LayerSpec
from headwise.spec.state import StateSpec

_LFM2_MOE: dict[str, object] = {
    "hidden_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "conv_L_cache": 3,
    "layer_types": None,
    "max_position_embeddings": 128000,
}
_LFM2 = _LFM2_MOE | {"hidden_size": 2560, "full_attn_idxs": None}
_KINDS = ("conv", "full_attention")


def _read(fields: ConfigFields) -> Layout:
    # published configs give the indices of the layers that attend; without any, all do
    given = fields.raw("full_attn_idxs")
    return _layout(fields, range(fields.layers("num_hidden_layers")) if given is None else given)


def _read_moe(fields: ConfigFields) -> Layout:
    return _layout(fields, None)


def _layout(fields: ConfigFields, attending: object) -> Layout:
    attention = grouped_heads(fields, qk_norm=True)
    convolution = StateSpec(
        conv_channels=fields.positive("hidden_size"), conv_width=fields.positive("conv_L_cache")
    )
    context = fields.positive("max_position_embeddings")
    layers = tuple(
        LayerSpec(index, attention if attends else convolution)
        for index, attends in enumerate(_attends(fields, attending))
    )
    return Layout(layers, (), context)


def _attends(fields: ConfigFields, attending: object) -> list[bool]:
    """Of each layer whether it attends: by layer_types, else by the indices of those that do."""
    layers = fields.layers("num_hidden_layers")
    kinds = layer_kinds(fields, layers, known=_KINDS)
    if kinds is not None:
        return [kind == "full_attention" for kind in kinds]
    if not isinstance(attending, range | list | tuple):
        raise SpecError(
            f"layer_types=None, and the layers that attend are {shown(attending)}: expected one of "
            f"{' or '.join(map(repr, _KINDS))} for each of the num_hidden_layers={layers} layers"
        )
    return [index in attending for index in range(layers)]


LFM2 = Family(model_type="lfm2", read=_read, defaults=_LFM2)
LFM2_MOE = Family(model_type="lfm2_moe", read=_read_moe, defaults=_LFM2_MOE)
LFM2_VL = Composite(model_type="lfm2_vl", text="lfm2")
