"""What a decoder predicts next, with all its heads and with some of them silenced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import OptionError
from headwise.generation.stepper import Stepper
from headwise.hf.observer import observing
from headwise.viewing.capture import Capture, Wanted
from headwise.viewing.tokens import Token, describe

TOP = 10


@dataclass(frozen=True)
class Guess:
    """A next token, with its probability before and after, and its rank after (0 is first)."""

    token: Token
    before: float
    after: float
    rank_before: int
    rank_after: int


@dataclass(frozen=True)
class Ablation:
    """The ten likeliest next tokens before, and after the output of `heads` was set to zero.

    divergence: Kullback-Leibler, of the distribution after from the one before, in bits; NaN where
    a logit is, and infinite where a token loses all its probability.
    """

    heads: tuple[tuple[int, int], ...]
    before: tuple[Guess, ...]
    after: tuple[Guess, ...]
    divergence: float


def ablate(
    model: Any, tokenizer: Any, ids: list[int], heads: Sequence[tuple[int, int]]
) -> Ablation:
    """Silence `heads` (layer, head) of an attached decoder, and predict the token after `ids`.

    A head is silenced by zeros in place of its output, at every position.

    Raises:
        OptionError: no such head.
    """
    pairs = isinstance(heads, Sequence) and all(
        isinstance(head, Sequence) and list(map(type, head)) == [int, int] for head in heads
    )
    if not pairs:
        raise OptionError(f"without is {heads!r}, expected pairs of layer and head, as [(5, 2)]")
    silent: dict[int, list[int]] = {}
    for layer, head in heads:
        silent.setdefault(layer, []).append(head)
    capture = Capture(model, Wanted(tokens=0), silent)
    before = _next(model, ids)
    with observing(capture):
        after = _next(model, ids)
    known = sorted(capture.indices.values())
    unknown = sorted(set(silent) - set(known))
    if unknown:
        raise OptionError(f"there is no layer {unknown[0]} to silence a head of; there are {known}")
    # a token that had no probability adds nothing, whatever it has after; NaN stays NaN
    terms = (before.exp() * (before - after)).masked_fill(before.isneginf(), 0.0)
    divergence = float(terms.sum()) / math.log(2)
    return Ablation(
        tuple(heads),
        _guesses(tokenizer, before, after, before),
        _guesses(tokenizer, before, after, after),
        max(divergence, 0.0),  # of rounding; in this order NaN stays
    )


def _next(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of the token after `ids`, [vocabulary], float32 on the CPU."""
    with torch.no_grad():
        logits = Stepper(model).read(torch.tensor([ids], device=model.device))
    return logits[0].float().log_softmax(dim=-1).cpu()


def _guesses(tokenizer: Any, before: Tensor, after: Tensor, by: Tensor) -> tuple[Guess, ...]:
    chosen = [int(token) for token in by.topk(min(TOP, len(by))).indices]
    return tuple(
        Guess(
            token,
            float(before[token.id].exp()),
            float(after[token.id].exp()),
            int((before > before[token.id]).sum()),
            int((after > after[token.id]).sum()),
        )
        for token in describe(tokenizer, chosen)
    )
