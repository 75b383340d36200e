"""What a Transformers attention module says of itself, without importing Transformers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import SpecError, UnsupportedError
from headwise.nn.rope import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling
from headwise.spec import FAMILIES, AttentionSpec, ModelSpec


@dataclass(frozen=True)
class Parts:
    """A module, the spec of its layer, and its rotary embedding."""

    module: Any
    spec: AttentionSpec
    rope: Rope
    hidden_size: int

    @property
    def made(self) -> dict[str, Any]:
        """Device and dtype of the weights."""
        weight = self.module.o_proj.weight
        return {"device": weight.device, "dtype": weight.dtype}

    def has_bias(self, name: str) -> bool:
        """Whether the projection `name` has a bias."""
        return getattr(getattr(self.module, name, None), "bias", None) is not None

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """Weights and biases of projections, by their names within the module."""
        found = {}
        for name in names:
            for part in ("weight", "bias"):
                tensor = getattr(getattr(self.module, name), part)
                if tensor is not None:
                    found[f"{name}.{part}"] = tensor
        return found

    def norms(self, *names: str) -> dict[str, Tensor]:
        """Weights of those norms that the module has; Gemma's are stored less 1."""
        found = {}
        for name in names:
            norm = getattr(self.module, name, None)
            if norm is not None:
                less_one = type(norm).__name__.startswith("Gemma")
                found[f"{name}.weight"] = norm.weight + 1 if less_one else norm.weight
        return found

    def eps(self, name: str) -> float:
        """The epsilon of a norm; any where there is none."""
        norm = getattr(self.module, name, None)
        return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def read(module: Any, projections: Iterable[str]) -> Parts:
    """Read `module`.

    Raises:
        UnsupportedError: it has no config or lacks one of the projections.
        SpecError: its config contradicts itself.
    """
    kind, config = type(module).__name__, getattr(module, "config", None)
    missing = [name for name in projections if type(getattr(module, name, None)) is not nn.Linear]
    if config is None or missing:
        what = f"a torch.nn.Linear called {missing[0]}" if missing else "a config"
        raise UnsupportedError(
            f"{kind} has not {what}: expected an attention module of a Transformers model, such "
            "as model.model.layers[0].self_attn"
        )
    try:
        layers = ModelSpec.from_config(config).layers
    except SpecError as error:
        raise UnsupportedError(f"{kind}: {error}") from None
    spec = layers[module.layer_idx].attention
    assert spec is not None
    return Parts(module, spec, _rope(config, spec, module.layer_idx), int(config.hidden_size))


def fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of these names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            layer.get_parameter(name).copy_(tensor)


def _rope(config: Any, spec: AttentionSpec, index: int) -> Rope:
    """The rotary embedding that Transformers' config describes for a layer."""
    family = FAMILIES[config.model_type]
    rotary = config.rope_parameters
    kinds = getattr(config, "layer_types", None)
    if "rope_type" not in rotary and kinds is not None:  # one for each kind of layer
        rotary = rotary[kinds[index]]
    part = rotary.get("partial_rotary_factor", 1.0)
    if part != 1.0 and (rotary["rope_type"] != "default" or not family.partial_rope):
        raise UnsupportedError(f"partial_rotary_factor={part}: expected 1, whole heads")
    return Rope(
        spec.rotary_dim,
        theta=rotary["rope_theta"],
        scaling=_scaling(config, rotary),
        interleaved=family.interleaved_rope or getattr(config, "rope_interleave", False),
    )


def _scaling(config: Any, given: Mapping[str, Any]) -> Scaling | None:
    kind, factor = given["rope_type"], given.get("factor")
    context = given.get("original_max_position_embeddings")
    if kind == "default":
        return None
    if factor is None and context is not None:
        factor = config.max_position_embeddings / context
    if factor is None:
        raise UnsupportedError(f"rope_type {kind!r} without a factor")
    if kind == "linear":
        return LinearScaling(factor)
    if context is not None and kind == "llama3":
        return Llama3Scaling(factor, context, given["low_freq_factor"], given["high_freq_factor"])
    if context is not None and kind == "yarn":
        return YarnScaling(
            factor,
            context,
            given.get("beta_fast") or 32.0,
            given.get("beta_slow") or 1.0,
            given.get("mscale"),
            given.get("mscale_all_dim"),
            given.get("attention_factor"),
            given.get("truncate", True),
        )
    raise UnsupportedError(f"rope_type {kind!r} is not built: expected linear, llama3 or yarn")
