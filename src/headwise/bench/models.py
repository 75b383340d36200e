"""A whole model's decoding at several contexts: checked, then timed in turn."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.bench.candidate import first_line
from headwise.bench.model_candidates import (
    GGUF_PEERS,
    HEADWISE,
    PEERS,
    REFERENCE,
    ModelCandidate,
    SdpaShapes,
    model_candidates,
)
from headwise.bench.presets import CONTEXTS
from headwise.bench.results import AtContext, LeftOut, ModelResult, ModelTimed, over_headwise
from headwise.errors import LoadError, OptionError
from headwise.generation.options import check_length, context_limit
from headwise.generation.session import LOGIT_TOLERANCE, check_decoder
from headwise.generation.stepper import random_tokens
from headwise.loading.model_folder import ModelFolder, cache_bytes
from headwise.loading.options import LoadOptions
from headwise.loading.source import demo_model, find_source
from headwise.measure.memory import peak_memory
from headwise.measure.timing import ROUNDS, Timing, interleaved

# Tokens that are read one by one and compared before any is timed.
_CHECKED = 4
_WARMUP = 2


class _Trial:
    """One candidate while it is measured, context after context."""

    def __init__(self, candidate: ModelCandidate) -> None:
        self.candidate, self.name = candidate, candidate.name
        self.contexts: list[AtContext] = []

    def prefill(self, ids: Tensor, context: int) -> None:
        """Read the context from an empty cache."""
        self.ids, self.context = ids, context
        self.stepper = self.candidate.stepper(ids.shape[1])

        def read() -> Tensor:
            began = time.perf_counter()
            logits = self.stepper.read(ids[:, :context])
            self.prefill_seconds = time.perf_counter() - began
            return logits

        self.logits, self.peak = peak_memory(read)
        self.unread = iter(ids[:, context:].split(1, dim=1))

    def step(self) -> Tensor:
        """Read the next token; its logits [1, vocabulary]."""
        return self.stepper.read(next(self.unread))

    def check(self) -> Tensor:
        """Read the tokens that are compared; all logits since the context [tokens, vocabulary]."""
        with SdpaShapes() as shapes:
            rows = [self.logits, *(self.step() for _ in range(_CHECKED))]
        self.path = shapes.last()
        return torch.cat(rows).float()

    def add_times(self, timings: Mapping[str, Timing], error: float) -> None:
        """Note what was measured at this context."""
        self.contexts.append(
            AtContext(
                context=self.context,
                prefill_seconds=self.prefill_seconds,
                **timings[self.name].summary(),
                ratio=over_headwise(self.name, timings),
                error=error,
            )
        )

    def result(self) -> ModelTimed:
        """What was measured at all contexts."""
        return ModelTimed(
            self.name,
            "; ".join(filter(None, (self.candidate.how, self.path))),
            tuple(self.contexts),
            _slope(self.contexts),
            self.peak,
            self.stepper.cache_nbytes(),
        )


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
    options = LoadOptions(
        dtype=dtype,
        attention="eager",  # the one that every model has; a candidate selects its own
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    opened = ModelFolder.find(place, options)
    config = opened.config
    check_decoder(place, config)
    check_length(max(contexts), _tokens_after(rounds), context_limit(config))
    loaded = opened.load()
    source = find_source(place)
    gguf = Path(source.place) if source.kind == "gguf" else None
    able = [peer for peer in PEERS if gguf is not None or peer not in GGUF_PEERS]
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
    peers: Sequence[str] = PEERS,
    rounds: int = ROUNDS,
    packed: bool = True,
    progress: Progress = silent,
) -> ModelResult:
    """Check and time headwise and its peers on a model, at each context.

    A context is random tokens, which stock reads as its `generate` does, and headwise in chunks
    where that is exact. Then each candidate reads the same further tokens:
    some to be checked against stock Transformers with a dynamic cache, then one per round, timed.

    Args:
        name: what to call the model.
        model: a Transformers decoder, on the CPU, which is left on stock attention.
        gguf: the file that it came from, for OpenVINO and llama.cpp.
        contexts: tokens in the cache before the timed ones.
        peers: names, of `PEERS`.
        rounds: how many tokens are timed.
        packed: whether headwise runs on the blocks of `gguf`; else on the model's weights.
        progress: called with a stage and how far it is.
    """
    asked = (HEADWISE, REFERENCE, *peers)
    candidates = [
        each for each in model_candidates(model, gguf, packed=packed) if each.name in asked
    ]
    tolerance = LOGIT_TOLERANCE[model.dtype]
    with torch.no_grad():
        left_out = _warm_up(model, candidates, progress)
        trials = [_Trial(candidate) for candidate in candidates]
        for context in sorted(set(contexts)):
            ids = random_tokens(model, context + _tokens_after(rounds))
            for trial in trials:
                progress(f"{trial.name}: reading {context:,} tokens", 0, 0)
                trial.prefill(ids, context)
            errors = _errors(trials)
            for trial in list(trials):
                allowed = trial.candidate.tolerance or tolerance
                if not errors[trial.name] <= allowed:
                    trials.remove(trial)
                    reason = (
                        f"logits differ from stock's by {errors[trial.name]:.1e} at {context:,} "
                        f"tokens, above the tolerance of {allowed:g}"
                    )
                    left_out.append(LeftOut(trial.name, "wrong", reason))
            timings = interleaved(
                {trial.name: trial.step for trial in trials},
                rounds=rounds,
                warmup=_WARMUP,
                progress=progress,
                stage=f"timing at {context:,} tokens",
            )
            for trial in trials:
                trial.add_times(timings, errors[trial.name])
    return ModelResult(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        weight_bytes=sum(tensor.nbytes for tensor in model.parameters()),
        rounds=rounds,
        tolerance=tolerance,
        timed=tuple(
            trial.result() for trial in trials if trial.name == HEADWISE or trial.name in peers
        ),
        left_out=tuple(left_out),
    )


def _errors(trials: Sequence[_Trial]) -> dict[str, float]:
    """How far each candidate's next logits are from stock's, over the norm of stock's."""
    logits = {trial.name: trial.check() for trial in trials}
    right = logits[REFERENCE]
    return {name: float((rows - right).norm() / right.norm()) for name, rows in logits.items()}


def _tokens_after(rounds: int) -> int:
    """Tokens that are read after a context."""
    return _CHECKED + _WARMUP + rounds


def _warm_up(model: Any, candidates: list[ModelCandidate], progress: Progress) -> list[LeftOut]:
    """Run each candidate once, and take those away that cannot run the model.

    Weights are read from disk by their first use, and kernels are chosen by theirs.
    """
    left_out = []
    limit = context_limit(model.config)
    ids = random_tokens(model, 600 if limit is None else min(600, limit - 1))
    for candidate in list(candidates):
        progress(f"{candidate.name}: warming up", 0, 0)
        try:
            stepper = candidate.stepper(ids.shape[1] + 1)
            stepper.read(ids)
            logits = stepper.read(ids[:, :1])
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


def _slope(contexts: Sequence[AtContext]) -> float | None:
    """Seconds per token for 1,000 more cached tokens; None at one context."""
    first, last = contexts[0], contexts[-1]
    if first is last:
        return None
    return 1000 * (last.seconds - first.seconds) / (last.context - first.context)
