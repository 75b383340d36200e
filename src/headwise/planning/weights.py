"""The weights of a model, counted without reading any: how many, and what a step reads."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.errors import SpecError, UnsupportedError
from headwise.planning.model import Model


@dataclass(frozen=True)
class Experts:
    """The experts of all layers that have `count` of them, of which a token takes `chosen`."""

    count: int
    chosen: int
    parameters: int

    def read(self, tokens: int) -> float:
        """Parameters that `tokens` tokens read, where each is as likely to take any expert.

        >>> Experts(count=4, chosen=1, parameters=400).read(1), Experts(4, 1, 400).read(2)
        (100.0, 175.0)
        """
        return self.parameters * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Weights:
    """Parameters of a model.

    Args:
        total: all of them, shared ones once.
        dense: those that a decode step multiplies whatever the tokens are. Tables of which a step
            looks a row up are not among them.
        encoder: those of an encoder, read once for a prompt.
        experts: of mixtures of experts.
    """

    total: int
    dense: int
    encoder: int = 0
    experts: tuple[Experts, ...] = ()

    def read(self, tokens: int) -> float:
        """Parameters that one pass over `tokens` tokens reads."""
        return self.dense + sum(each.read(tokens) for each in self.experts)

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.read(1)


def count_weights(model: Model) -> Weights:
    """Count from the modules that Transformers would build, which are made without any memory.

    Raises:
        SpecError: Transformers does not take the config.
        UnsupportedError: a family that Transformers has no model of.
    """
    if model.spec.family == "palm":
        return _palm(model.config)
    built = build_on_meta(model)
    encoder = built.get_encoder() if getattr(built.config, "is_encoder_decoder", False) else None
    inside = set() if encoder is None else set(encoder.modules())
    chosen = _chosen_experts(built.config)
    sizes: dict[int, int] = {}
    uses: dict[int, str | int] = {}
    for path, module in built.named_modules():
        for parameter in module.parameters(recurse=False):
            key = id(parameter)
            sizes[key] = parameter.numel()
            if isinstance(module, nn.Embedding):
                uses.setdefault(key, "looked up")
            elif module in inside:
                uses[key] = "encoder"
            elif chosen and "experts" in path.split("."):
                uses[key] = parameter.shape[0]
            else:
                uses[key] = "dense"
    amounts: dict[str | int, int] = {}
    for key, use in uses.items():
        amounts[use] = amounts.get(use, 0) + sizes[key]
    experts = tuple(
        Experts(use, chosen, amount) for use, amount in amounts.items() if isinstance(use, int)
    )
    return Weights(sum(sizes.values()), amounts.get("dense", 0), amounts.get("encoder", 0), experts)


def build_on_meta(model: Model) -> Any:
    """Transformers' model for a config, on the meta device: shapes, and no memory.

    Raises:
        SpecError: Transformers does not take the config.
        UnsupportedError: a family that Transformers has no model of.
    """
    config = transformers_config(model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class(model).from_config(config)


def transformers_config(model: Model, **changes: Any) -> Any:
    """The config as Transformers' object, with some fields changed.

    Raises:
        SpecError: Transformers does not take it.
        UnsupportedError: a family that Transformers has no model of.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {key: value for key, value in model.config.items() if key != "auto_map"}
    family = fields.pop("model_type")
    if family == "palm":
        raise UnsupportedError(f"{model.name}: Transformers has no model of this family to run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoConfig.for_model(family, **_copied({**fields, **changes}))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        line = " ".join(str(error).split())
        raise SpecError(f"{model.name}: Transformers does not take this config: {line}") from error


def model_class(model: Model) -> Any:
    """The class of Transformers that makes such a model: encoder, encoder-decoder or decoder."""
    import transformers

    if not model.spec.layers:
        return transformers.AutoModel
    if model.spec.encoder_layers:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _chosen_experts(config: Any) -> int:
    """Experts that a token takes; 0 where there are none."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk"):
        chosen = getattr(config, name, None)
        if isinstance(chosen, int) and chosen:
            return chosen
    return 0


def _copied(fields: dict[str, Any]) -> dict[str, Any]:
    # Config classes write into the nested dicts that they are given.
    return {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}


def _palm(config: dict[str, Any]) -> Weights:
    """PaLM's matrices: query, shared key and value, output, a SwiGLU, and the tied embedding.

    Source: https://arxiv.org/abs/2204.02311, section 2.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, dim = config["num_attention_heads"], config["head_dim"]
    layer = 2 * hidden * heads * dim + 2 * hidden * dim + 3 * hidden * inner + hidden
    total = config["num_hidden_layers"] * layer + config["vocab_size"] * hidden + hidden
    return Weights(total, total)
