"""Qwen3-Next, Qwen3.5 and its MoE: three layers of gated linear attention, then a full one."""

from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout
from headwise.spec.config.windows import layer_kinds
from headwise.spec.layer import LayerSpec
from headwise.spec.state import StateSpec

_NEXT: dict[str, object] = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
    "max_position_embeddings": 32768,
}
_KINDS = ("linear_attention", "full_attention")


def _read(fields: ConfigFields) -> Layout:
    attention, state = grouped_heads(fields, qk_norm=True), _state(fields)
    layers = tuple(
        LayerSpec(index, attention if full else state)
        for index, full in enumerate(_full_layers(fields))
    )
    return Layout(layers, (), fields.positive("max_position_embeddings"))


def _state(fields: ConfigFields) -> StateSpec:
    key_dim, value_dim = (fields.positive(f"linear_{kind}_head_dim") for kind in ("key", "value"))
    key_heads, heads = (fields.positive(f"linear_num_{kind}_heads") for kind in ("key", "value"))
    return StateSpec(
        conv_channels=2 * key_heads * key_dim + heads * value_dim,
        conv_width=fields.positive("linear_conv_kernel_dim"),
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        key_heads=key_heads,
    )


def _full_layers(fields: ConfigFields) -> list[bool]:
    layers = fields.layers("num_hidden_layers")
    types = layer_kinds(fields, layers, known=_KINDS)
    if types is None:
        interval = fields.positive("full_attention_interval")
        return [(index + 1) % interval == 0 for index in range(layers)]
    return [kind == "full_attention" for kind in types]


QWEN3_NEXT = Family(model_type="qwen3_next", read=_read, defaults=_NEXT, partial_rope=True)
QWEN3_5_TEXT = Family(
    model_type="qwen3_5_text",
    read=_read,
    defaults=_NEXT | {"num_hidden_layers": 32, "num_key_value_heads": 4},
    partial_rope=True,
)
QWEN3_5 = Composite(model_type="qwen3_5", text="qwen3_5_text")
QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    read=_read,
    defaults=_NEXT | {"num_hidden_layers": 40},
    partial_rope=True,
)
QWEN3_5_MOE = Composite(model_type="qwen3_5_moe", text="qwen3_5_moe_text")
