"""Mamba-2: states alone, no attention."""

from headwise.errors import SpecError
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.layer import LayerSpec
from headwise.spec.state import StateSpec

_MAMBA2: dict[str, object] = {
    "num_heads": 128,
    "head_dim": 64,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
}


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("num_heads"), fields.positive("head_dim")
    inner, size = fields.positive("expand") * fields.positive("hidden_size"), heads * head_dim
    if size != inner:
        raise SpecError(
            f"num_heads={heads} with head_dim={head_dim}: expected heads that add up to "
            f"expand x hidden_size = {inner}"
        )
    state = StateSpec.mamba2(
        heads=heads,
        groups=fields.positive("n_groups"),
        key_dim=fields.positive("state_size"),
        value_dim=head_dim,
        width=fields.positive("conv_kernel"),
    )
    layers = fields.layers("num_hidden_layers")
    return Layout(tuple(LayerSpec(index, state) for index in range(layers)), (), None)


MAMBA2 = Family(model_type="mamba2", read=_read, defaults=_MAMBA2)
