"""What a generation may be asked for, checked before any work is done."""

import math
from dataclasses import dataclass

from headwise.errors import OptionError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one (greedy).

    >>> Sampling(temperature=-1)
    Traceback (most recent call last):
    headwise.errors.OptionError: temperature is -1; expected 0 (greedy) or above

    Raises:
        OptionError: names the option that is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max-new-tokens is {self.max_new_tokens}; expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError(f"temperature is {self.temperature}; expected 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top-p is {self.top_p}; expected above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed is {self.seed}; expected 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the choice involves no chance."""
        return self.temperature == 0

    def generate_arguments(self) -> dict[str, object]:
        """These options as arguments of Transformers' generate.

        What is not among them, a repetition penalty say, is left to the model's own generation
        config.
        """
        if self.greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


def check_length(
    prompt_tokens: int, max_new_tokens: int, limit: int | None, *, at_least: bool = False
) -> None:
    """Refuse a prompt that is empty, or with its answer longer than the model's context.

    >>> check_length(8000, 300, 8192)
    Traceback (most recent call last):
    headwise.errors.ShapeError: prompt (8000 tokens) and answer (300) make 8300 tokens, ...

    Raises:
        ShapeError: says both numbers and what to do.
    """
    if not prompt_tokens:
        raise ShapeError("the prompt has no tokens; give some text")
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        count = f"at least {prompt_tokens}" if at_least else f"{prompt_tokens}"
        raise ShapeError(
            f"prompt ({count} tokens) and answer ({max_new_tokens}) make "
            f"{prompt_tokens + max_new_tokens} tokens, more than the model's {limit}; shorten the "
            "context or lower --max-new-tokens"
        )


def context_limit(config: object) -> int | None:
    """The tokens that a model's positions reach, None where its config states no limit."""
    text = getattr(config, "get_text_config", None)
    limit = getattr(text(decoder=True) if text else config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
