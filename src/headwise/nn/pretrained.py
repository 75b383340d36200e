"""What a Transformers attention module says of itself, without importing Transformers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.errors import SpecError, UnsupportedError
from headwise.nn.rope import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling
from headwise.spec import FAMILIES, AttentionSpec, ModelSpec

_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")


@dataclass(frozen=True)
class PretrainedLayer:
    """A module of Transformers, the spec of its layer, and its rotary embedding."""

    module: Any
    spec: AttentionSpec
    rope: Rope

    @classmethod
    def read(cls, module: Any, projections: Iterable[str]) -> "PretrainedLayer":
        """Read `module`.

        Raises:
            UnsupportedError: it does not have a config or one of the projections, or does more than
                what is built here.
            SpecError: its config contradicts itself.
        """
        kind, config = type(module).__name__, getattr(module, "config", None)
        missing = [
            name for name in projections if type(getattr(module, name, None)) is not nn.Linear
        ]
        if config is None or missing:
            what = f"a torch.nn.Linear called {missing[0]}" if missing else "a config"
            raise UnsupportedError(
                f"{kind} has not {what}: expected an attention module of a Transformers model, "
                "such as model.model.layers[0].self_attn"
            )
        copied = [name for name, family in FAMILIES.items() if family.copies]
        model_type = getattr(config, "model_type", None)
        if model_type not in copied:
            raise UnsupportedError(
                f"{kind}: attention of model_type {model_type!r} may do more than is "
                f"copied: expected one of {', '.join(copied)}"
            )
        try:
            layers = ModelSpec.from_config(config).layers
        except SpecError as error:
            raise UnsupportedError(f"{kind}: {error}") from None
        spec = layers[module.layer_idx].attention
        assert spec is not None
        return cls(module, spec, _rope(config, spec, module.layer_idx))

    def arguments(self, norm: str) -> dict[str, Any]:
        """What the layer here is made with; `norm` names the module that states an epsilon."""
        stated, weight = getattr(self.module, norm, None), self.module.o_proj.weight
        return {
            "spec": self.spec,
            "hidden_size": int(self.module.config.hidden_size),
            "rope": self.rope,
            "norm_eps": float(getattr(stated, "variance_epsilon", getattr(stated, "eps", 1e-6))),
            "device": weight.device,
            "dtype": weight.dtype,
        }

    def has_bias(self, name: str) -> bool:
        """Whether the projection `name` has a bias."""
        return getattr(getattr(self.module, name, None), "bias", None) is not None

    def fill(self, layer: nn.Module, names: Mapping[str, str]) -> None:
        """Copy the weights of those modules of `names` that there are; values are names in `layer`.

        The layer trains where the module does. Gemma stores the weight of a norm less 1.
        """
        for stock, name in names.items():
            source = getattr(self.module, stock, None)
            if source is None:
                continue
            less_one = type(source).__name__.startswith("Gemma")
            for part, tensor in source.named_parameters():
                target = layer.get_parameter(f"{name}.{part}").data
                target.copy_(tensor.detach() + less_one)
        layer.train(self.module.training)


def _rope(config: Any, spec: AttentionSpec, index: int) -> Rope:
    """The rotary embedding that Transformers' config describes for a layer."""
    family = FAMILIES[config.model_type]
    rotary = config.rope_parameters
    kinds = getattr(config, "layer_types", None)
    if "rope_type" not in rotary and kinds is not None:  # one for each kind of layer
        rotary = rotary[kinds[index]]
    part = rotary.get("partial_rotary_factor", 1.0)
    if part != 1.0 and (rotary["rope_type"] != "default" or family.partial_rope):
        raise UnsupportedError(f"partial_rotary_factor={part}: expected 1, whole heads")
    return Rope(
        spec.rotary_dim,
        theta=rotary["rope_theta"],
        scaling=scaling_of(rotary, config.max_position_embeddings),
        interleaved=family.interleaved_rope or getattr(config, "rope_interleave", False),
    )


def scaling_of(rotary: Mapping[str, Any], longest: int) -> Scaling | None:
    """The scaling that a config's `rope_parameters` ask for, of a model of `longest` positions.

    Raises:
        UnsupportedError: a `rope_type` that is not built, or one without its factor.
    """
    kind, factor = rotary["rope_type"], rotary.get("factor")
    context = rotary.get("original_max_position_embeddings")
    if kind == "default":
        return None
    if factor is None and context is not None:
        factor = longest / context
    if factor is None:
        raise UnsupportedError(f"rope_type {kind!r} without a factor")
    if kind == "linear":
        return LinearScaling(factor)
    if context is not None and kind == "llama3":
        return Llama3Scaling(factor, context, rotary["low_freq_factor"], rotary["high_freq_factor"])
    if context is not None and kind == "yarn":
        # as in Transformers, None and 0 stand for the default
        stated = {name: rotary.get(name) for name in _YARN}
        options: Any = {name: value for name, value in stated.items() if value or value is False}
        return YarnScaling(factor, context, **options)
    raise UnsupportedError(f"rope_type {kind!r} is not built: expected linear, llama3 or yarn")
