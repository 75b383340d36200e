"""A whole model's decoding at several contexts: checked, then timed in turn."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.bench.candidate import first_line
from headwise.bench.model_candidates import (
    HEADWISE,
    PEERS,
    REFERENCE,
    ModelCandidate,
    SdpaShapes,
    model_candidates,
)
from headwise.bench.openvino_candidate import OPENVINO, OpenVinoDecoder
from headwise.bench.results import LeftOut
from headwise.errors import LoadError, OptionError
from headwise.generation.options import check_length, context_limit
from headwise.generation.session import LOGIT_TOLERANCE, check_decoder
from headwise.generation.stepper import Stepper
from headwise.loading.load import cache_bytes, load_config, load_model, model_folder
from headwise.loading.source import demo_model, find_source
from headwise.measure.memory import peak_memory
from headwise.measure.timing import Ratio, Timing, interleaved, ratio

CONTEXTS = (100, 2000, 8000)
# Tokens that are read one by one and compared before any is timed.
_CHECKED = 4
_WARMUP = 2


@dataclass(frozen=True)
class AtContext:
    """A model's next tokens at one context.

    `prefill_seconds` is one reading of the context; `seconds` the median a token over
    rounds, `low` and `high` the quartiles; `ratio` how many times as long a token takes as with
    headwise; `error` the norm of the difference of the logits to stock's, over theirs.
    """

    context: int
    prefill_seconds: float
    seconds: float
    low: float
    high: float
    ratio: Ratio | None
    error: float


@dataclass(frozen=True)
class ModelTimed:
    """One way to run a model.

    `slope` is seconds that a token takes longer for 1,000 more cached ones, between the shortest
    and the longest context; `peak_memory` bytes above the weights while the longest context was
    read, None where the system does not say; `cache_bytes` those of the cache at its end, None
    where a peer does not say.
    """

    name: str
    how: str
    contexts: tuple[AtContext, ...]
    slope: float | None
    peak_memory: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class ModelResult:
    """A model in one dtype; `weight_bytes` is what its weights take."""

    model: str
    dtype: str
    threads: int
    weight_bytes: int
    rounds: int
    tolerance: float
    timed: tuple[ModelTimed, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def headwise_wrong(self) -> bool:
        """Whether headwise itself gave wrong logits."""
        return any(at.state == "wrong" and at.name == HEADWISE for at in self.left_out)


@dataclass
class _Trial:
    """One candidate at one context, while it is measured."""

    candidate: ModelCandidate
    decoder: Stepper | OpenVinoDecoder
    prefill_seconds: float
    peak: int | None
    logits: Tensor
    error: float = 0.0
    path: str = ""


def select_model_peers(names: Iterable[str]) -> list[str]:
    """The peers to time; all where none is named, and no peer for "none".

        >>> select_model_peers([])
        ['stock-dynamic', 'stock-static', 'openvino']

    Raises:
        OptionError: an unknown name.
    """
    asked = list(names)
    if asked == ["none"]:
        return []
    for name in asked:
        if name not in PEERS:
            raise OptionError(f"peer {name!r} is unknown; use {', '.join(PEERS)}, or none")
    return asked or list(PEERS)


def open_model(
    model: str | None,
    *,
    dtype: str,
    contexts: Sequence[int],
    rounds: int,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[str, Any, Path | None]:
    """The name and the model (None: the demo model), after checking that the contexts fit it.

    And the GGUF file that it came from, None for others.

    Raises:
        LoadError: no such model, or not one that writes text.
        ShapeError: a context and the timed tokens are longer than the model's positions.
        OptionError: contexts below 1.
        CapacityError: weights, and caches for all candidates, would not fit in memory.
    """
    if min(contexts) < 1:
        raise OptionError(f"contexts has {min(contexts)}; expected at least 1 token")
    place = model if model is not None else demo_model()
    folder = model_folder(place, progress=progress)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_decoder(place, config)
    check_length(max(contexts), _tokens_after(rounds), context_limit(config))
    loaded = load_model(
        folder,
        config,
        dtype=dtype,
        attention="eager",  # the one that every model has; a candidate selects its own
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    source = find_source(place)
    gguf = Path(source.place) if source.kind == "gguf" else None
    able = [peer for peer in PEERS if gguf is not None or peer != OPENVINO]
    longest = max(contexts) + _tokens_after(rounds)
    needed = 2 * (1 + len(able)) * cache_bytes(config, longest, loaded.dtype)
    check_memory(needed, loaded.device, f"caches of {longest} tokens for all candidates")
    return source.name, loaded, gguf


def bench_model(
    name: str,
    model: Any,
    gguf: Path | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
    peers: Sequence[str] = tuple(PEERS),
    rounds: int = 21,
    progress: Callable[[str, int, int], object] = silent,
) -> ModelResult:
    """Check and time headwise and its peers on a model, at each context.

    A context is random tokens, which stock reads as its `generate` does, and headwise in chunks
    where that is exact. Then each candidate reads the same further tokens:
    some to be checked against stock Transformers with a dynamic cache, then one a round, timed.

    Args:
        name: what to call the model.
        model: a Transformers decoder, on the CPU, which is left on stock attention.
        gguf: the file that it came from, for OpenVINO.
        contexts: tokens in the cache before the timed ones.
        peers: names, as `select_model_peers` returns them.
        rounds: how many tokens are timed.
        progress: called with a stage and how far it is.
    """
    asked = (HEADWISE, REFERENCE, *peers)
    candidates = [at for at in model_candidates(model, gguf) if at.name in asked]
    tolerance = LOGIT_TOLERANCE[model.dtype]
    left_out: list[LeftOut] = []
    found: dict[str, list[AtContext]] = {}
    last: dict[str, tuple[int | None, int | None]] = {}
    paths: dict[str, str] = {}
    with torch.no_grad():
        left_out += _warm_up(model, candidates, progress)
        for context in sorted(set(contexts)):
            ids = _tokens(model, context + _tokens_after(rounds))
            trials = [_prefill(at, ids, context, progress) for at in candidates]
            _check(trials, ids, context)
            for trial in trials:
                allowed = trial.candidate.tolerance or tolerance
                if not trial.error <= allowed:
                    candidates.remove(trial.candidate)
                    found.pop(trial.candidate.name, None)
                    reason = (
                        f"logits differ from stock's by {trial.error:.1e} at {context:,} tokens, "
                        f"above the tolerance of {allowed:g}"
                    )
                    left_out.append(LeftOut(trial.candidate.name, "wrong", reason))
            trials = [at for at in trials if at.candidate in candidates]
            timings = _time(trials, ids, context, rounds, progress)
            for trial in trials:
                at = _at_context(trial, timings, context)
                found.setdefault(trial.candidate.name, []).append(at)
                paths[trial.candidate.name] = trial.path
                last[trial.candidate.name] = (trial.peak, trial.decoder.cache_nbytes())
    return ModelResult(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        weight_bytes=sum(tensor.nbytes for tensor in model.parameters()),
        rounds=rounds,
        tolerance=tolerance,
        timed=tuple(
            ModelTimed(
                at.name,
                "; ".join(filter(None, (at.how, paths[at.name]))),
                tuple(found[at.name]),
                _slope(found[at.name]),
                *last[at.name],
            )
            for at in candidates
            if at.name == HEADWISE or at.name in peers
        ),
        left_out=tuple(left_out),
    )


def _tokens_after(rounds: int) -> int:
    """Tokens that are read after a context."""
    return _CHECKED + _WARMUP + rounds


def _tokens(model: Any, count: int) -> Tensor:
    """Random tokens [1, count], the same ones each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def _warm_up(
    model: Any, candidates: list[ModelCandidate], progress: Callable[[str, int, int], object]
) -> list[LeftOut]:
    """Run each candidate once, and take those away that cannot run the model.

    Weights are read from disk by their first use, and kernels are chosen by theirs.
    """
    left_out = []
    ids = _tokens(model, 600)
    limit = context_limit(model.config)
    if limit is not None:
        ids = ids[:, : limit - 1]
    for candidate in list(candidates):
        progress(f"{candidate.name}: warming up", 0, 0)
        try:
            decoder = candidate.decoder(ids.shape[1] + 1)
            decoder.read(ids)
            logits = decoder.read(ids[:, :1])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # what Transformers raises where a model does not go with a cache
            if candidate.name in (HEADWISE, REFERENCE):
                raise
            candidates.remove(candidate)
            left_out.append(LeftOut(candidate.name, "absent", first_line(error)))
            continue
        if candidate.name == REFERENCE and not bool(logits.isfinite().all()):
            raise LoadError(
                f"the model's logits are not numbers in {str(model.dtype)[6:]}: its weights are "
                "damaged, or need another --dtypes"
            )
    return left_out


def _prefill(
    candidate: ModelCandidate,
    ids: Tensor,
    context: int,
    progress: Callable[[str, int, int], object],
) -> _Trial:
    progress(f"{candidate.name}: reading {context:,} tokens", 0, 0)
    decoder = candidate.decoder(ids.shape[1])

    def read() -> tuple[Tensor, float]:
        began = time.perf_counter()
        logits = decoder.read(ids[:, :context])
        return logits, time.perf_counter() - began

    (logits, seconds), peak = peak_memory(read)
    return _Trial(candidate, decoder, seconds, peak, logits)


def _check(trials: Sequence[_Trial], ids: Tensor, context: int) -> None:
    """Read the next tokens one by one, and note how far the logits are from stock's."""
    logits = {}
    for trial in trials:
        rows = [trial.logits]
        with SdpaShapes() as shapes:
            rows += [trial.decoder.read(ids[:, at : at + 1]) for at in _next(context, _CHECKED)]
        trial.path = shapes.last()
        logits[trial.candidate.name] = torch.cat(rows).float()
    right = logits[REFERENCE]
    for trial in trials:
        difference = logits[trial.candidate.name] - right
        trial.error = float(difference.norm() / right.norm())


def _next(start: int, count: int) -> range:
    return range(start, start + count)


def _time(
    trials: Sequence[_Trial],
    ids: Tensor,
    context: int,
    rounds: int,
    progress: Callable[[str, int, int], object],
) -> dict[str, Timing]:
    turns, done = len(trials) * (rounds + _WARMUP), 0

    def before(name: str) -> None:
        nonlocal done
        progress(f"timing at {context:,} tokens", done, turns)
        done += 1

    def step(trial: _Trial) -> Callable[[], object]:
        rest = iter(_next(context + _CHECKED, rounds + _WARMUP))

        def read_one() -> None:
            at = next(rest)
            trial.decoder.read(ids[:, at : at + 1])

        return read_one

    return interleaved(
        {trial.candidate.name: step(trial) for trial in trials},
        rounds=rounds,
        warmup=_WARMUP,
        before=before,
    )


def _at_context(trial: _Trial, timings: dict[str, Timing], context: int) -> AtContext:
    timing = timings[trial.candidate.name]
    low, high = timing.quartiles
    ours = timings.get(HEADWISE)
    return AtContext(
        context=context,
        prefill_seconds=trial.prefill_seconds,
        seconds=timing.median,
        low=low,
        high=high,
        ratio=None if trial.candidate.name == HEADWISE or ours is None else ratio(timing, ours),
        error=trial.error,
    )


def _slope(contexts: Sequence[AtContext]) -> float | None:
    """Seconds a token for 1,000 more cached tokens; None at one context."""
    first, last = contexts[0], contexts[-1]
    if first is last:
        return None
    return 1000 * (last.seconds - first.seconds) / (last.context - first.context)
