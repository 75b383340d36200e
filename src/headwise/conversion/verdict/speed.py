"""What a conversion gains in speed: both models' decoding with headwise, timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import reason
from headwise.base.memory import available_bytes, gib
from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.weights import in_attention
from headwise.errors import HeadwiseError
from headwise.generation.attention import select_attention
from headwise.generation.options import context_limit
from headwise.generation.session import LOGIT_TOLERANCE
from headwise.generation.stepper import Stepper, random_tokens
from headwise.loading.model_folder import cache_bytes
from headwise.loading.weight_files import weight_bytes
from headwise.measure.timing import Ratio, interleaved, ratio

CONTEXTS = (512, 2048, 8192)
ROUNDS = 21
_WARMUP = 3
# Tokens that are read, to check the decoding and to begin a cache with.
_START = 256


@dataclass(frozen=True)
class DecodeSpeed:
    """One sequence's decoding up to a context, in tokens.

    `original` and `converted` are median seconds per token, `ratio` how many times as fast the
    converted model is.
    """

    context: int
    original: float
    converted: float
    ratio: Ratio


@dataclass(frozen=True)
class Speeds:
    """Both models' decoding, each on headwise.

    Args:
        contexts: shortest first; empty where nothing was measured, and `note` says why.
        original, converted: the layers and the backends that ran them, in words.
    """

    contexts: tuple[DecodeSpeed, ...] = ()
    original: str = ""
    converted: str = ""
    note: str = ""


def timed(original: Checkpoint, converted: Checkpoint, progress: Progress) -> Speeds:
    """Decoding before and after; that it cannot be measured is no reason to lose the result."""
    try:
        return compare_speed(original, converted, progress=progress)
    except (HeadwiseError, RuntimeError) as error:
        cause = reason(error).replace(f"{original.folder.parent}/", "")
        return _not_measured(cause)


def compare_speed(
    original: Checkpoint,
    converted: Checkpoint,
    *,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> Speeds:
    """Load both models and time their decoding, one token of each in turn.

    What the conversion did not touch, all weights but the attention's, is in memory once.

    At a context c the tokens that are timed are the last `rounds` of c. A context that the models'
    positions do not reach is left out.

    Raises:
        LoadError: a folder that is no model.
        OptionError: fewer than 4 rounds.
    """
    configs = [checkpoint.config for checkpoint in (original, converted)]
    limits = [limit for limit in map(context_limit, configs) if limit is not None]
    longest = min(limits, default=max(contexts))
    reached = sorted({context for context in contexts if rounds + _WARMUP < context <= longest})
    if not reached:
        return _not_measured(
            f"the shortest context is {min(contexts):,} tokens and the models take {longest:,}"
        )
    shared = {name for name in original.weights if not in_attention(name)}
    needed = weight_bytes(original.folder, None)
    needed += weight_bytes(converted.folder, None, without=shared)
    needed += sum(2 * cache_bytes(config, reached[-1], config.dtype) for config in configs)
    free = available_bytes(torch.device("cpu"))
    if needed > free:
        return _not_measured(
            f"both models and their caches need {gib(needed)}, and {gib(free)} of memory is free"
        )
    models = {
        "original": original.load(progress=progress, attention="eager"),
        "converted": converted.load(progress=progress, attention="eager"),
    }
    _share(**models)
    with torch.no_grad():
        return _measure(models, reached, rounds, progress)


def _not_measured(cause: str) -> Speeds:
    return Speeds(note=f"decode speed was not measured: {cause}")


def _share(original: Any, converted: Any) -> None:
    """Give the converted model the original's own tensors where the conversion left them alone."""
    replaced = converted.state_dict()
    untouched = {
        name: parameter
        for name, parameter in original.named_parameters(remove_duplicate=False)
        if not in_attention(name)
        and (own := replaced.get(name)) is not None
        and (own.shape, own.dtype) == (parameter.shape, parameter.dtype)
    }
    converted.load_state_dict(untouched, strict=False, assign=True)


def _measure(
    models: dict[str, Any], contexts: Sequence[int], rounds: int, progress: Progress
) -> Speeds:
    turns = random_tokens(models["original"], rounds + _WARMUP)
    start = random_tokens(models["original"], _START)[:, : contexts[0] - turns.shape[1]]
    layers, speeds = {}, []
    for name, model in models.items():
        progress(f"checking the decoding of the {name} model", 0, 0)
        layers[name], error = _attach(model, start)
        if not error <= LOGIT_TOLERANCE[model.dtype]:
            return _not_measured(
                f"the {name} model's logits with headwise differ from those without by {error:.1e}"
            )
    for context in contexts:
        progress(f"timing the decoding at {context:,} tokens", 0, 0)
        length = context - turns.shape[1]
        steps = {
            name: _steps(_filled(model, start, length, context), turns)
            for name, model in models.items()
        }
        timings = interleaved(steps, rounds=rounds, warmup=_WARMUP)
        slow, fast = timings["original"], timings["converted"]
        speeds.append(DecodeSpeed(context, slow.median, fast.median, ratio(slow, fast)))
        del steps  # with its caches, before the next ones are made
    return Speeds(tuple(speeds), **layers)


def _attach(model: Any, ids: Tensor) -> tuple[str, float]:
    """Attach headwise: what it runs, and how far the logits after `ids` are from those without.

    The distance is the norm of the difference over the norm.
    """
    without = Stepper(model).read(ids).float()
    groups = select_attention(model, "headwise")
    difference = Stepper(model).read(ids).float() - without
    words = "; ".join(map(str, groups))
    return words, float(difference.norm() / without.norm())


def _filled(model: Any, start: Tensor, length: int, context: int) -> Stepper:
    """A decoder whose cache contains `length` tokens: `start` [1, S], and copies of its rows.

    It takes no more memory than `context` tokens need, where those are below 64 MiB per layer.

    What is in a cache changes nothing in the time of a step, and to read a long context with a
    large model takes long.
    """
    decoder = Stepper(model)
    decoder.read(start)
    for layer in decoder.cache.layers:
        keys, values = layer.keys, layer.values
        # A buffer that must grow doubles what it then has: half of the context makes room for
        # all of it. More steps on the way would each leave a buffer behind.
        for tokens in ((context + 1) // 2, length):
            rows = torch.arange(max(0, tokens - layer.get_seq_length())) % keys.shape[2]
            layer.update(keys[:, :, rows], values[:, :, rows])
    decoder.ids = start[:, torch.arange(length) % start.shape[1]]
    return decoder


def _steps(decoder: Stepper, ids: Tensor) -> Callable[[], object]:
    """Reads the next one of ids [1, S] at each call."""
    rest = iter(ids.split(1, dim=1))
    return lambda: decoder.read(next(rest))
