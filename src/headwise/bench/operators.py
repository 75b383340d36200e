"""Candidates of one operator on one shape: checked, then timed in turn with cold caches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from headwise.base.progress import Progress, silent
from headwise.bench.candidate import Bind, Candidate, first_line
from headwise.bench.headwise_candidates import HEADWISE
from headwise.bench.peers import all_peers
from headwise.bench.results import (
    BesideResult,
    LeftOut,
    ShapeResult,
    Timed,
    is_headwise,
    over_headwise,
)
from headwise.bench.verify import TOLERANCES, error, expected
from headwise.measure.inputs import Cold, make_cold, make_inputs
from headwise.measure.machine import Figures, use_threads
from headwise.measure.shape import Beside, Shape
from headwise.measure.timing import Ratio, Timing, interleaved, ratio


@dataclass(frozen=True)
class _Entry:
    """One candidate on one shape, checked, with what it is timed on."""

    name: str
    how: str
    threads: int
    error: float
    bytes: int
    flops: int
    run: Callable[[], object]

    def timed(self, timings: Mapping[str, Timing]) -> Timed:
        """Its row of the result; `judged` sets the share of the roofline."""
        timing = timings[self.name]
        return Timed(
            name=self.name,
            how=self.how,
            threads=self.threads,
            error=self.error,
            **timing.summary(),
            ratio=over_headwise(self.name, timings),
            bytes_per_second=self.bytes / timing.median,
            flops_per_second=self.flops / timing.median,
            roofline=0.0,
        )


def bench_shape(
    shape: Shape,
    dtype: torch.dtype,
    *,
    peers: Sequence[str],
    figures: Mapping[int, Figures],
    threads: int,
    rounds: int,
    progress: Progress = silent,
) -> ShapeResult:
    """Check and time headwise and its peers on a shape.

    Args:
        shape: what to compute.
        dtype: float32, bfloat16 or float16.
        peers: names, as `select_peers` returns them.
        figures: the machine's by number of threads, with a peak for `dtype`.
        threads: PyTorch's number of threads, which the caller has set.
        rounds: how often each candidate is timed.
        progress: called with a stage and how far it is.
    """
    name = str(dtype).removeprefix("torch.")
    stage = f"{shape} {name}"
    progress(f"{stage}: checking", 0, 0)
    known = all_peers()
    chosen = [known[peer] for peer in known if peer in peers]
    left_out: list[LeftOut] = []
    beside = shape.beside(threads)
    with torch.inference_mode():
        entries, cold = _enter(shape, dtype, (HEADWISE, *chosen), threads, "", left_out)
        if beside is not None:
            label = f", {beside.label}"
            entries += _enter(beside.shape, dtype, (HEADWISE,), beside.threads, label, left_out)[0]
        timings = _time(entries, threads, rounds, progress, f"{stage}: timing")
    result = ShapeResult(
        shape=str(shape),
        description=shape.describe(),
        dtype=name,
        threads=threads,
        bytes=shape.bytes(dtype.itemsize),
        flops=shape.flops,
        rounds=rounds,
        tolerance=TOLERANCES[dtype],
        cold=cold.cold,
        note=cold.note(),
        timed=tuple(entry.timed(timings) for entry in entries),
        left_out=tuple(left_out),
        beside=None if beside is None else _beside(shape, beside, timings),
    )
    return judged(result, figures)


def judged(result: ShapeResult, figures: Mapping[int, Figures]) -> ShapeResult:
    """A result whose shares of the roofline are by these figures."""
    timed = []
    for row in result.timed:
        rates = row.bytes_per_second, row.flops_per_second
        timed.append(replace(row, roofline=figures[row.threads].share(*rates, result.dtype)))
    return replace(result, timed=tuple(timed))


def _enter(
    shape: Shape,
    dtype: torch.dtype,
    candidates: Iterable[Candidate],
    threads: int,
    label: str,
    left_out: list[LeftOut],
) -> tuple[list[_Entry], Cold]:
    """Check the candidates for a shape; those that are not timed are added to `left_out`."""
    inputs = make_inputs(shape, dtype)
    right = expected(inputs)
    checked: list[tuple[Candidate, Bind, float]] = []
    for candidate in candidates:
        if shape.operator not in candidate.operators:
            continue
        try:
            bind = candidate.build(inputs)
            rounded = candidate.rounded
            goal = right if rounded is None else expected(rounded(inputs))
            wrong = error(bind(inputs)(), goal)
        except (RuntimeError, ValueError) as problem:
            if is_headwise(candidate.name):
                raise
            left_out.append(LeftOut(candidate.name + label, "absent", first_line(problem)))
            continue
        if wrong <= TOLERANCES[dtype]:
            checked.append((candidate, bind, wrong))
        else:  # also NaN
            reason = f"error {wrong:.1e}, above the tolerance of {TOLERANCES[dtype]:g}"
            left_out.append(LeftOut(candidate.name + label, "wrong", reason))
    cold = make_cold(inputs)
    turns, backend = itertools.cycle(range(len(cold.copies))), inputs.explain().runs
    entries = [
        _Entry(
            name=candidate.name + label,
            how=f"{backend.backend}: {backend.reason}"
            if is_headwise(candidate.name)
            else candidate.about,
            threads=threads,
            error=wrong,
            bytes=shape.bytes(dtype.itemsize, candidate.bits),
            flops=shape.flops,
            # each candidate takes the next copy, so that none finds what another has just read
            run=_on_next(bind, cold, turns),
        )
        for candidate, bind, wrong in checked
    ]
    return entries, cold


def _on_next(bind: Bind, cold: Cold, turns: Iterator[int]) -> Callable[[], object]:
    calls = [bind(inputs) for inputs in cold.copies]
    return lambda: calls[next(turns)]()


def _time(
    entries: Sequence[_Entry], threads: int, rounds: int, progress: Progress, stage: str
) -> dict[str, Timing]:
    """Each entry with its own number of threads; `threads` are set again afterwards."""
    if not entries:
        return {}
    counts = {entry.name: entry.threads for entry in entries}
    with use_threads(threads):  # which sets them again afterwards
        return interleaved(
            {entry.name: entry.run for entry in entries},
            rounds=rounds,
            before=lambda name: torch.set_num_threads(counts[name]),
            progress=progress,
            stage=stage,
        )


def _beside(shape: Shape, beside: Beside, timings: Mapping[str, Timing]) -> BesideResult | None:
    ours, other = timings.get(HEADWISE.name), timings.get(f"{HEADWISE.name}, {beside.label}")
    if ours is None or other is None:
        return None
    times = ratio(ours, other)
    share = beside.shape.tokens / shape.tokens
    scaled = Ratio(times.median * share, times.low * share, times.high * share)
    return BesideResult(beside.label, beside.threads, scaled)
