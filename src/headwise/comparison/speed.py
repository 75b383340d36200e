"""What the decoders cost: time of training and decoding, bytes of cache, peak memory.

Times are taken in turn, one mechanism after the other in each round, so that a busy machine is fair
to all. Trained weights would change nothing in them, so the decoders are new ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.caches import ContiguousCache, StateCache
from headwise.comparison.configuration import Configuration
from headwise.comparison.models import build
from headwise.comparison.task import Task
from headwise.comparison.training import new_optimizer, train_step
from headwise.errors import OptionError
from headwise.measure.memory import peak_memory
from headwise.measure.timing import Timing, interleaved
from headwise.nn import Decoder, Memory
from headwise.nn.decoder import LayerCache

ROUNDS = 21
CONTEXTS = (1024, 8192, 32768)
# One step of a small decoder is too short to be timed alone.
_STEPS = 8
_CHECKED = 24
_TOLERANCE = 1e-3
_PEAKS = 3


@dataclass(frozen=True)
class Rate:
    """Tokens/s: the median over rounds, and the quartiles."""

    tokens_per_second: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, timing: Timing) -> "Rate":
        """The rate of calls that each process so many tokens."""
        fast, slow = timing.quartiles
        return cls(tokens / timing.median, tokens / slow, tokens / fast)


@dataclass(frozen=True)
class DecodeRate:
    """How fast one sequence is decoded after `context` tokens."""

    context: int
    rate: Rate


@dataclass(frozen=True)
class Speed:
    """What one mechanism's decoder costs, in float32.

    `cache_bytes_per_token` is what the caches of all layers hold for each token, as they say it (a
    state and a window: nothing), and their memories;
    `peak_memory` the bytes that a training step takes above the weights and the optimizer's state,
    None where the system does not tell; `error` the largest difference of a logit between decoding
    with the cache and reading the whole sequence, relative to the largest logit.
    """

    mechanism: str
    cache_bytes_per_token: int
    error: float
    training: Rate
    decode: tuple[DecodeRate, ...]
    peak_memory: int | None

    def row(self) -> dict[str, Any]:
        """The medians, flat."""
        decoded = {
            f"decode_tokens_per_second_{each.context}": each.rate.tokens_per_second
            for each in self.decode
        }
        return {
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "training_tokens_per_second": self.training.tokens_per_second,
            "peak_memory": self.peak_memory,
        } | decoded


def check_contexts(configuration: Configuration, contexts: Sequence[int]) -> tuple[int, ...]:
    """The contexts in ascending order, each once.

    Raises:
        OptionError: there is none, or one below 1.
        CapacityError: the caches of all mechanisms would not fit in memory.
    """
    known = isinstance(contexts, Sequence) and all(
        isinstance(context, int) and context >= 1 for context in contexts
    )
    if not contexts or not known:
        raise OptionError(f"contexts is {contexts!r}, expected numbers of tokens from 1")
    ordered = tuple(sorted(set(contexts)))
    layers = chain.from_iterable(map(configuration.mixers, configuration.mechanisms))
    # a cache that grows holds up to twice its tokens, and the old buffer beside the new one
    held = sum(layer.cache_bytes(ordered[-1], dtype="float32") for layer in layers)
    needed, what = 3 * held, f"decoding {ordered[-1]:,} tokens"
    check_memory(needed, torch.device("cpu"), what, "give smaller contexts")
    return ordered


def measure_speed(
    configuration: Configuration,
    task: Task,
    *,
    contexts: Sequence[int],
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> list[Speed]:
    """Measure every mechanism of the configuration.

    Raises:
        OptionError: fewer than 4 rounds.
    """
    names = configuration.mechanisms
    models = {name: build(configuration, name, seed=0) for name in names}
    errors = {name: _checked(name, model) for name, model in models.items()}
    # the longest sequences, those of the last step
    batch = task.batch(configuration.steps - 1, torch.Generator().manual_seed(0))
    progress("timing the training", 0, 0)
    steps: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        optimizer = new_optimizer(model, configuration.learning_rate)
        steps[name] = partial(train_step, model, optimizer, batch)
    trained = interleaved(steps, rounds=rounds)
    peaks = {name: _peak(steps[name]) for name in names}
    decoded: dict[str, list[DecodeRate]] = {name: [] for name in names}
    sizes = {}
    for index, context in enumerate(contexts):
        progress("timing the decoding", index, len(contexts))
        caches = {name: filled(model, context) for name, model in models.items()}
        sizes = {name: bytes_per_token(models[name], some) for name, some in caches.items()}
        turns = {name: partial(_decode, models[name], caches[name]) for name in names}
        timings = interleaved(turns, rounds=rounds, before=partial(_crop, caches, context))
        for name, timing in timings.items():
            decoded[name].append(DecodeRate(context, Rate.of(_STEPS, timing)))
    return [
        Speed(
            mechanism=name,
            cache_bytes_per_token=sizes[name],
            error=errors[name],
            training=Rate.of(batch.tokens.numel(), trained[name]),
            decode=tuple(decoded[name]),
            peak_memory=peaks[name],
        )
        for name in names
    ]


@torch.no_grad()
def filled(model: Decoder, context: int) -> list[LayerCache]:
    """Caches that hold `context` tokens of one sequence; random numbers, which take as long.

    A state is as large after one token. A memory holds all of them, none of which waits.
    """
    caches = model.new_caches()
    model.clear_memory()
    model(torch.zeros(1, 1, dtype=torch.int64), caches=caches)
    for cache in caches:
        if not isinstance(cache, StateCache):
            cache.append(*(_random(cache.first, context - 1), _random(cache.second, context - 1)))
    for memory in _memories(model):
        one = (memory.waiting_keys, memory.waiting_values)
        one = (memory.keys, memory.values) if one[0] is None else one
        rows = _random(one[0], context), _random(one[1], context)
        memory.clear()
        memory.remember(*rows)
    return caches


def _random(like: Tensor | None, rows: int) -> Tensor:
    assert like is not None
    return torch.randn(*like.shape[:2], rows, like.shape[3])


def _memories(model: Decoder) -> list[Memory]:
    return [each for each in model.modules() if isinstance(each, Memory)]


def bytes_per_token(model: Decoder, caches: Sequence[LayerCache]) -> int:
    """Bytes that all caches and memories together hold per token; a state or a window holds none.

    >>> model = build(Configuration(width=64, heads=8), "mqa", seed=0)
    >>> bytes_per_token(model, filled(model, 7))  # 2 layers, key and value of 8 float32
    128
    """
    per_token = [divmod(cache.nbytes, cache.length) for cache in _growing(caches)]
    per_token += [divmod(memory.nbytes, memory.rows) for memory in _memories(model)]
    assert not any(rest for _, rest in per_token)
    return sum(each for each, _ in per_token)


def _growing(caches: Sequence[LayerCache]) -> list[ContiguousCache]:
    """Those of all keys and values."""
    return [cache for cache in caches if isinstance(cache, ContiguousCache)]


@torch.no_grad()
def _checked(name: str, model: Decoder) -> float:
    """How far decoding a sequence token by token is from reading it at once."""
    tokens = torch.randint(
        model.embedding.num_embeddings, (2, _CHECKED), generator=torch.Generator().manual_seed(0)
    )
    model.clear_memory()
    logits, caches = model(tokens), model.new_caches()
    model.clear_memory()
    steps = torch.cat([model(token, caches=caches) for token in tokens.split(1, dim=1)], dim=1)
    error = ((steps - logits).abs().max() / logits.abs().max()).item()
    assert error < _TOLERANCE, f"{name} decodes other logits than it computes: {error}"
    return error


@torch.no_grad()
def _decode(model: Decoder, caches: list[LayerCache]) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(_STEPS):
        token = model(token, caches=caches)[:, -1].argmax(dim=-1, keepdim=True)


def _crop(caches: Mapping[str, list[LayerCache]], context: int, name: str) -> None:
    for cache in _growing(caches[name]):
        cache.crop(context)


def _peak(step: Callable[[], object]) -> int | None:
    """The median of a few: what the allocator had kept makes single ones differ."""
    peaks = [peak for peak in (peak_memory(step)[1] for _ in range(_PEAKS)) if peak is not None]
    return round(median(peaks)) if peaks else None
