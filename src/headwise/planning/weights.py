"""The weights of a model, counted without reading any: how many, and what a step reads."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from headwise.errors import SpecError
from headwise.planning.model import PlannedModel
from headwise.planning.stock_model import build_on_meta
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


# Modules that make keys and values of an encoder's tokens: T5's, BERT's and GPT-2's, Whisper's.
_CROSS = re.compile(
    r"EncDecAttention\.[kv]$|crossattention\.(self\.(key|value)|c_attn)$|encoder_attn\.[kv]_proj$"
)


def count_weights(model: PlannedModel) -> Weights:
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
    named = ("num_experts_per_tok", "top_k_experts")
    chosen = next((n for name in named if (n := getattr(built.config, name, None))), 0)
    uses: dict[nn.Parameter, str | int] = {}
    for path, module in built.named_modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                uses.setdefault(weight, "looked up")
            elif module in inside:
                uses[weight] = "encoder"
            elif chosen and "experts" in path.split("."):
                uses[weight] = _expert_count(model, weight.shape[0], chosen)
            else:
                uses[weight] = "cross" if _CROSS.search(path) else "dense"
    amounts = Counter[str | int]()
    for weight, use in uses.items():
        amounts[use] += weight.numel()
    experts = tuple(
        Experts(use, chosen, amount) for use, amount in amounts.items() if isinstance(use, int)
    )
    output = built.get_output_embeddings() if model.spec.layers else None
    head = 0 if output is None else sum(weight.numel() for weight in output.parameters())
    total, dense = amounts.total(), amounts["dense"]
    tied = model.config.get("tie_word_embeddings")
    if model.spec.layers and output is None:
        # a text part that is built alone has no head, and its table is of the head's size
        head = built.get_input_embeddings().weight.numel()
        total, dense = total + (0 if tied else head), dense + head
    if family.ties_head and tied is False:
        total += head
    return Weights(total, dense, head, amounts["encoder"], amounts["cross"], experts)


def _expert_count(model: PlannedModel, count: int, chosen: int) -> int:
    if positive_int("num_experts_per_tok", chosen) > count:
        raise SpecError(
            f"{model.name}: num_experts_per_tok={chosen}: expected 1 to {count}, the experts"
        )
    return count
