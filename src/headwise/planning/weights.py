"""The weights of a model, counted without reading any: how many, and what a step reads."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.errors import SpecError, UnsupportedError
from headwise.planning.model import Model
from headwise.spec import FAMILIES, config_fields
from headwise.spec.checks import positive_int


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
        head: those of `dense` that make logits, which a prompt needs for its last token only.
        encoder: those of an encoder, multiplied with its tokens alone.
        cross: those that make keys and values of an encoder's tokens, once for a prompt.
        experts: of mixtures of experts.
    """

    total: int
    dense: int
    head: int = 0
    encoder: int = 0
    cross: int = 0
    experts: tuple[Experts, ...] = ()

    def read(self, tokens: int) -> float:
        """Parameters that one pass of the decoder over `tokens` tokens reads."""
        return self.dense + sum(each.read(tokens) for each in self.experts)

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.read(1)


# Of what Transformers says to a config, with all of a field's content in it.
_LONGEST = 300
# Modules that make keys and values of an encoder's tokens: T5's, BERT's and GPT-2's.
_CROSS = re.compile(r"EncDecAttention\.[kv]$|crossattention\.(self\.(key|value)|c_attn)$")


def count_weights(model: Model) -> Weights:
    """Count from the modules that Transformers would build, which are made without any memory.

    Raises:
        SpecError: Transformers does not take the config.
        UnsupportedError: a family that Transformers has no model of.
    """
    family = FAMILIES[model.spec.family]
    if family.weights is not None:
        total, head = family.weights(config_fields(model.config))
        return Weights(total, total, head)
    built = build_on_meta(model)
    encoder = built.get_encoder() if model.spec.encoder_layers and model.spec.layers else None
    inside = set() if encoder is None else set(encoder.modules())
    chosen = getattr(built.config, "num_experts_per_tok", None) or 0
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
                uses[key] = _expert_count(model, parameter.shape[0], chosen)
            else:
                uses[key] = "cross" if _CROSS.search(path) else "dense"
    amounts: dict[str | int, int] = {}
    for key, use in uses.items():
        amounts[use] = amounts.get(use, 0) + sizes[key]
    experts = tuple(
        Experts(use, chosen, amount) for use, amount in amounts.items() if isinstance(use, int)
    )
    output = built.get_output_embeddings() if model.spec.layers else None
    head = 0 if output is None else sum(weight.numel() for weight in output.parameters())
    total, dense = sum(sizes.values()), amounts.get("dense", 0)
    if family.ties_head and model.config.get("tie_word_embeddings") is False:
        total += head
    return Weights(total, dense, head, amounts.get("encoder", 0), amounts.get("cross", 0), experts)


def _expert_count(model: Model, count: int, chosen: int) -> int:
    if positive_int("num_experts_per_tok", chosen) > count:
        raise SpecError(
            f"{model.name}: num_experts_per_tok={chosen}: expected 1 to {count}, the experts"
        )
    return count


def build_on_meta(model: Model, dtype: str = "bfloat16") -> Any:
    """Transformers' model for a config, on the meta device: shapes, and no memory.

    Raises:
        SpecError: Transformers does not take the config.
        UnsupportedError: a family that Transformers has no model of.
    """
    config = transformers_config(model)
    with torch.device("meta"), transformers_takes(model):
        made = model_class(model)
        # an Auto class, or a class itself
        build = getattr(made, "from_config", None) or made._from_config
        return build(config, dtype=getattr(torch, dtype))


def transformers_config(model: Model) -> Any:
    """The config as Transformers' object.

    Raises:
        SpecError: Transformers does not take it.
        UnsupportedError: a family that Transformers has no model of.
    """
    from transformers import AutoConfig

    fields = {key: value for key, value in model.config.items() if key not in _NOT_SHAPES}
    family = fields.pop("model_type")
    if not FAMILIES[model.spec.family].in_transformers:
        raise UnsupportedError(f"{model.name}: Transformers has no model of this family to run")
    with transformers_takes(model):
        config = AutoConfig.for_model(family, **_copied(fields))
        padding = getattr(config, "pad_token_id", None)
        # Fine-tunes have a padding token beyond the vocabulary, and no row for it.
        if isinstance(padding, int) and padding >= getattr(config, "vocab_size", padding + 1):
            config.pad_token_id = None
        return config


# What a config says beside the model's shapes; some of it needs packages that are not installed.
_NOT_SHAPES = frozenset(
    (
        "_attn_implementation",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
    )
)


@contextmanager
def transformers_takes(model: Model) -> Iterator[None]:
    """What Transformers raises for a config that it does not take, as one line.

    Raises:
        SpecError: in place of what its config classes, modules and caches raise.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (
        *(ValueError, TypeError, LookupError, AttributeError, AssertionError),
        *(ImportError, RuntimeError, ArithmeticError, StrictDataclassError),
    ) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        line = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
        raise SpecError(f"{model.name}: Transformers does not take this config: {line}") from error


def model_class(model: Model) -> Any:
    """The class of Transformers that makes such a model: encoder, encoder-decoder or decoder."""
    import transformers

    if not model.spec.layers:
        return getattr(transformers, FAMILIES[model.spec.family].encoder_class)
    if model.spec.encoder_layers:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _copied(fields: dict[str, Any]) -> dict[str, Any]:
    # Config classes write into the nested dicts that they are given.
    return {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}
