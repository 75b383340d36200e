"""Nemotron, and Nemotron-H: Mamba-2, attention and MLPs, each in layers of their own."""

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.layer import LayerSpec, Mixer
from headwise.spec.state import StateSpec
from headwise.spec.uncovered import Uncovered

_NEMOTRON: dict[str, object] = {
    "hidden_size": 6144,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 4096,
}
_NEMOTRON_H: dict[str, object] = {
    "layers_block_type": None,
    "hybrid_override_pattern": None,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
}
# What a layer is: by the letter of a pattern, by its name, and by its name before Transformers 5.
_KINDS = {
    **dict.fromkeys(("M", "linear_attention", "mamba"), "mamba"),
    **dict.fromkeys(("*", "full_attention", "attention"), "attention"),
    **dict.fromkeys(("-", "mlp", "E", "moe"), "mlp"),
}
_DEFAULT = "ME*-"
_MOST_LAYERS = 10_000


def _read_nemotron(fields: ConfigFields) -> Layout:
    layers = fields.layers("num_hidden_layers")
    return one_stack([grouped_heads(fields)] * layers, fields.positive("max_position_embeddings"))


def _read_nemotron_h(fields: ConfigFields) -> Layout:
    mixers: dict[str, Mixer] = {
        "mamba": _state(fields),
        "attention": grouped_heads(fields),
        "mlp": Uncovered("an MLP, which mixes no tokens"),
    }
    layers = tuple(LayerSpec(index, mixers[kind]) for index, kind in enumerate(_kinds(fields)))
    return Layout(layers, (), fields.positive("max_position_embeddings"))


def _state(fields: ConfigFields) -> StateSpec:
    return StateSpec.mamba2(
        heads=fields.positive("mamba_num_heads"),
        groups=fields.positive("n_groups"),
        key_dim=fields.positive("ssm_state_size"),
        value_dim=fields.positive("mamba_head_dim"),
        width=fields.positive("conv_kernel"),
    )


def _kinds(fields: ConfigFields) -> list[str]:
    """What each layer is; their number is that of the list or the pattern, as in Transformers."""
    name = "layers_block_type"
    if fields.raw(name) is None and fields.raw("hybrid_override_pattern") is not None:
        name = "hybrid_override_pattern"
    given = _DEFAULT if fields.raw(name) is None else fields.raw(name)
    kind = str if name == "hybrid_override_pattern" or given is _DEFAULT else list | tuple
    if not isinstance(given, kind) or not 0 < len(given) <= _MOST_LAYERS:
        raise SpecError(f"{name}={shown(given)}: expected 1 to {_MOST_LAYERS:,} kinds of layers")
    unknown = [each for each in given if not isinstance(each, str) or each not in _KINDS]
    if unknown:
        raise SpecError(
            f"{name} contains {shown(unknown[0])}, which is not covered: expected "
            f"{' or '.join(map(repr, _KINDS))}"
        )
    return [_KINDS[each] for each in given]


NEMOTRON = Family(model_type="nemotron", read=_read_nemotron, defaults=_NEMOTRON, partial_rope=True)
NEMOTRON_H = Family(
    model_type="nemotron_h",
    read=_read_nemotron_h,
    defaults=_NEMOTRON_H,
    aliases={
        "layer_types": "layers_block_type",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
    },
)
