"""What a conversion brings in speed: both models' decoding with headwise, timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.memory import available_bytes, gib
from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.weights import Weights, in_attention
from headwise.generation.attention import select_attention
from headwise.generation.options import context_limit
from headwise.generation.session import LOGIT_TOLERANCE
from headwise.generation.stepper import Stepper
from headwise.hf.owned import NAME
from headwise.loading.load import cache_bytes, load_config, load_model
from headwise.loading.memory import weight_bytes
from headwise.measure.timing import Ratio, interleaved, ratio

CONTEXTS = (512, 2048, 8192)
ROUNDS = 21
_WARMUP = 3
# Tokens that are read, to check the decoding and to begin a cache with.
_START = 256
_NAMES = ("original", "converted")


@dataclass(frozen=True)
class DecodeSpeed:
    """One sequence's decoding up to a context of so many tokens.

    `original` and `converted` are median seconds a token, `ratio` how many times as fast the
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


def compare_speed(
    original: Path,
    converted: Path,
    *,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> Speeds:
    """Load both models from their folders and time their decoding, one token of each in turn.

    What the conversion did not touch, all weights but the attention's, is in memory once.

    At a context c the tokens that are timed are the last `rounds` of c. A context that the models'
    positions do not reach is left out.

    Raises:
        LoadError: a folder that is no model.
        OptionError: fewer than 4 rounds.
    """
    configs = [load_config(folder) for folder in (original, converted)]
    limits = [limit for limit in map(context_limit, configs) if limit is not None]
    longest = min(limits, default=max(contexts))
    fitting = sorted({at for at in contexts if rounds + _WARMUP < at <= longest})
    if not fitting:
        return Speeds(
            note=f"decode speed was not measured: the shortest context is {min(contexts):,} tokens "
            f"and the models take {longest:,}"
        )
    untouched = {name for name in Weights(original) if not in_attention(name)}
    needed = weight_bytes(original, None) + weight_bytes(converted, None, without=untouched)
    needed += sum(2 * cache_bytes(config, fitting[-1], config.dtype) for config in configs)
    free = available_bytes(torch.device("cpu"))
    if needed > free:
        return Speeds(
            note=f"decode speed was not measured: both models and their caches need {gib(needed)}, "
            f"and {gib(free)} of memory is free"
        )
    models = [
        load_model(folder, config, attention="eager", progress=progress)
        for folder, config in zip((original, converted), configs, strict=True)
    ]
    _share(*models)
    with torch.no_grad():
        return _measure(models, fitting, rounds, progress)


def _share(original: Any, converted: Any) -> None:
    """Give the converted model the original's own tensors where the conversion left them alone."""
    kept = dict(original.named_parameters(remove_duplicate=False))
    for place, module in converted.named_modules():
        for name, own in list(module.named_parameters(recurse=False)):
            whole = f"{place}.{name}"
            same = kept.get(whole)
            if same is None or in_attention(whole):
                continue
            if (same.shape, same.dtype) == (own.shape, own.dtype):
                setattr(module, name, same)


def _measure(
    models: Sequence[Any], contexts: Sequence[int], rounds: int, progress: Progress
) -> Speeds:
    named = dict(zip(_NAMES, models, strict=True))
    start = _tokens(models[0], _START)[:, : contexts[0] - rounds - _WARMUP]
    ran = []
    for name, model in named.items():
        progress(f"checking the decoding of the {name} model", 0, 0)
        how, error = _attach(model, start)
        if not error <= LOGIT_TOLERANCE[model.dtype]:
            return Speeds(
                note=f"decode speed was not measured: the {name} model's logits with headwise "
                f"differ from those without by {error:.1e}"
            )
        ran.append(how)
    turns, found = _tokens(models[0], rounds + _WARMUP), []
    for context in contexts:
        progress(f"timing the decoding at {context:,} tokens", 0, 0)
        decoders = {
            name: _filled(model, start, context - turns.shape[1], context)
            for name, model in named.items()
        }
        timings = interleaved(
            {name: _steps(decoder, turns) for name, decoder in decoders.items()},
            rounds=rounds,
            warmup=_WARMUP,
        )
        slow, fast = (timings[name] for name in _NAMES)
        found.append(DecodeSpeed(context, slow.median, fast.median, ratio(slow, fast)))
        del decoders, timings  # before the next ones are made
    return Speeds(tuple(found), *ran)


def _tokens(model: Any, count: int) -> Tensor:
    """Random tokens [1, count], the same ones each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def _attach(model: Any, ids: Tensor) -> tuple[str, float]:
    """Attach headwise: what it runs, and how far the logits after `ids` are from those without.

    The distance is the norm of the difference over the norm.
    """
    without = Stepper(model).read(ids).float()
    layers = select_attention(model, NAME)
    apart = Stepper(model).read(ids).float() - without
    ran = "; ".join(f"{at.layers} x {at.mechanism} on {at.backend}" for at in layers)
    return ran, float(apart.norm() / without.norm())


def _filled(model: Any, start: Tensor, length: int, context: int) -> Stepper:
    """A decoder whose cache holds `length` tokens: `start` [1, S], and copies of its rows.

    It takes no more memory than `context` tokens need, where those are below 64 MiB a layer.

    What is in a cache changes nothing in the time of a step, and to read a long context with a
    large model takes long.
    """
    decoder = Stepper(model)
    decoder.read(start)
    for layer in decoder.cache.layers:
        keys, values = layer.keys, layer.values
        # A buffer that must grow doubles what it then holds: half of the context makes room for
        # all of it. More steps on the way would each leave a buffer behind.
        for held in ((context + 1) // 2, length):
            rows = torch.arange(max(0, held - layer.get_seq_length())) % keys.shape[2]
            layer.update(keys[:, :, rows], values[:, :, rows])
    decoder.ids = start[:, torch.arange(length) % start.shape[1]]
    return decoder


def _steps(decoder: Stepper, ids: Tensor) -> Callable[[], object]:
    """Reads the next one of ids [1, S] at each call."""
    rest = iter(ids.split(1, dim=1))
    return lambda: decoder.read(next(rest))
