"""What a conversion costs in quality: next tokens of a text that nothing was fitted to."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.errors import ConversionError
from headwise.generation.stepper import Stepper

# Tokens that are read at once, where that changes nothing: their logits, in float32, are what the
# judging takes in memory.
_SLICE = 128
_PROMPT = 32
_CONTINUED = 48


@dataclass(frozen=True)
class Quality:
    """How well a model predicts the held-out text.

    Args:
        perplexity: the exponential of the mean negative log-likelihood per token.
        agreement: the share of positions at which the likeliest token is the original's.
        continuation: the greedy continuation of the judge's prompt.
    """

    perplexity: float
    agreement: float
    continuation: str


class Judge:
    """Judges models by what the original makes of a text.

    It keeps the original's likeliest tokens and nothing else of it, so that only the model that is
    judged has to be in memory.

    Args:
        original: a Transformers decoder.
        tokenizer: its tokenizer.
        tokens: [N, S], sequences of the held-out text.

    Attributes:
        original: the original's own `Quality`.
        prompt: what is continued, the beginning of the first sequence.
        positions: how many tokens are predicted, N(S-1).

    Raises:
        ConversionError: logits that are not numbers.
    """

    def __init__(
        self, original: Any, tokenizer: Any, tokens: Tensor, progress: Progress = silent
    ) -> None:
        assert tokens.ndim == 2
        assert tokens[:, 1:].numel() > 0
        self.tokenizer, self.tokens, self.progress = tokenizer, tokens, progress
        self._prompt = tokens[:1, : min(_PROMPT, tokens.shape[1])]
        self.prompt = self._text(self._prompt[0])
        self.positions = tokens[:, 1:].numel()
        self._likeliest, nats = self._read(original, "original")
        self.original = Quality(_perplexity(nats), 1.0, self._continue(original))

    def judge(self, model: Any, name: str = "converted") -> Quality:
        """Judge a model with the same tokens; `name` is for progress and errors."""
        likeliest, nats = self._read(model, name)
        agreement = (likeliest == self._likeliest).double().mean().item()
        return Quality(_perplexity(nats), agreement, self._continue(model))

    @torch.no_grad()
    def _read(self, model: Any, name: str) -> tuple[Tensor, float]:
        """The likeliest token at each position [N(S-1)], and the mean nats of the text's own."""
        likeliest, nats = [], 0.0
        for done, sequence in enumerate(self.tokens):
            self.progress(f"judging the {name} model", done, len(self.tokens))
            following = sequence[1:]
            for part in Stepper(model).read_all(sequence[None, :-1].to(model.device), _SLICE):
                logits = part[0].float().cpu()
                here, following = following[: len(logits)], following[len(logits) :]
                nats += cross_entropy(logits, here, reduction="sum").item()
                likeliest.append(logits.argmax(-1))
        if not math.isfinite(nats):
            raise ConversionError(
                f"the {name} model's logits are not numbers on the held-out text; its weights are "
                "damaged, or its dtype is too narrow for them"
            )
        return torch.cat(likeliest), nats / self.positions

    @torch.no_grad()
    def _continue(self, model: Any) -> str:
        """The greedy continuation of the prompt, up to the end of the text."""
        stepper, tokens = Stepper(model), []
        ids = self._prompt.to(model.device)
        for _ in range(_CONTINUED):
            ids = stepper.read(ids).argmax(-1, keepdim=True)
            if int(ids) == self.tokenizer.eos_token_id:
                break
            tokens.append(int(ids))
        return self._text(torch.tensor(tokens))

    def _text(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def judged(
    original: Checkpoint, results: dict[str, Checkpoint], held_out: Tensor, progress: Progress
) -> dict[str, Any]:
    """The fields of a verdict that say the quality; one model is in memory at a time.

    Args:
        results: the converted checkpoint and, where there was a tuning, the tuned one, by name.
        held_out: [M, S], tokens that nothing was fitted to.

    Raises:
        ConversionError: logits that are not numbers.
    """
    model = original.load(progress=progress)
    judge = Judge(model, original.tokenizer, held_out, progress)
    del model
    fields = {
        name: judge.judge(result.load(progress=progress), name) for name, result in results.items()
    }
    return fields | {name: getattr(judge, name) for name in ("prompt", "positions", "original")}


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700))  # a float, and JSON, hold no more
