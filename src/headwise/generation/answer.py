"""An answer: the tokens that a model generated, how clear each was, and what it all took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from headwise.generation.attention import BackendLayers


@dataclass(frozen=True)
class Margin:
    """How clear the choice of one token was: the best logit, and its lead over the second."""

    best: float
    lead: float


@dataclass
class Answer:
    """What one generation gave and took.

    `sparse`: how a step chooses its keys, "" where it sees all. `prefill_seconds` is what the model
    took to read the prompt, which gives the logits of the first token too. `decode_seconds` has one
    entry per token; the first counts from the beginning, with the reading of the prompt.
    `ranks`: processes that shared the context, of whose caches this one's is counted.
    `known_tokens` of the prompt were remembered, and not read. `read_bytes`: what the last step
    read of the cache. `logits`: of the first tokens, where they were to be kept. `interrupted`: by
    the user, so that tokens may lack.
    """

    attention: str
    layers: tuple[BackendLayers, ...]
    prompt_tokens: int
    sparse: str = ""
    ranks: int = 1
    tokens: list[int] = field(default_factory=list)
    margins: list[Margin] = field(default_factory=list)
    known_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: list[float] = field(default_factory=list)
    cache_tokens: int = 0
    cache_bytes: int = 0
    read_bytes: int = 0
    logits: list[Tensor] = field(default_factory=list)
    interrupted: bool = False

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second; None where nothing was prefilled."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens per second after the first; None where there is no second one."""
        steady = self.decode_seconds[1:]
        return len(steady) / sum(steady) if steady else None

    @property
    def decode_median(self) -> float | None:
        """Median seconds per generated token after the first; None where there is no second one."""
        return median(self.decode_seconds[1:]) if self.decode_seconds[1:] else None

    @property
    def cache_bytes_per_token(self) -> float | None:
        """Bytes of cache over the tokens that it has read; None where there is no cache."""
        return self.cache_bytes / self.cache_tokens if self.cache_tokens else None

    def report(self, text: str) -> dict[str, Any]:
        """The answer, whose `text` this is, for JSON; times in seconds, sizes in bytes."""
        return {
            "attention": self.attention,
            "sparse": self.sparse or None,
            "ranks": self.ranks,
            "layers": [asdict(group) for group in self.layers],
            "text": text,
            "tokens": self.tokens,
            "remembered": {"tokens": self.known_tokens},
            "prefill": {
                "tokens": self.prefill_tokens,
                "seconds": self.prefill_seconds,
                "tokens_per_second": self.prefill_rate,
            },
            "decode": {
                "tokens": len(self.tokens),
                "seconds": sum(self.decode_seconds),
                "tokens_per_second": self.decode_rate,
                "median_seconds_per_token": self.decode_median,
            },
            "cache": {
                "tokens": self.cache_tokens,
                "bytes": self.cache_bytes,
                "bytes_read_per_step": self.read_bytes,
                "bytes_per_token": self.cache_bytes_per_token,
            },
            "interrupted": self.interrupted,
        }


def identical(answers: Sequence[Answer]) -> bool | None:
    """Whether answers have the same tokens; None without two whole ones."""
    if len(answers) < 2 or any(answer.interrupted for answer in answers):
        return None
    return all(answer.tokens == answers[0].tokens for answer in answers[1:])


def first_difference(first: list[int], second: list[int]) -> int | None:
    """The position of the first token that differs, None where there is none.

    >>> first_difference([5, 7, 11], [5, 7, 13]), first_difference([5], [5])
    (2, None)
    """
    if first == second:
        return None
    pairs = enumerate(zip(first, second))
    shorter = min(len(first), len(second))
    return next((index for index, (one, other) in pairs if one != other), shorter)


def divergence(first: Answer, second: Answer) -> tuple[float, int] | None:
    """The mean KL divergence of the second's next tokens from the first's, in nats; over how many.

    As far as both have read the same and kept their logits; None where they kept none.
    """
    same = first_difference(first.tokens, second.tokens)
    count = min(
        len(first.logits), len(second.logits), len(first.tokens) if same is None else same + 1
    )
    if not count:
        return None
    total = 0.0
    for one, other in zip(first.logits[:count], second.logits[:count]):
        log, others = one.double().log_softmax(0), other.double().log_softmax(0)
        total += float((log.exp() * (log - others)).nan_to_num(0).sum())
    return total / count, count
