"""Candidates of one operator on one shape: checked, then timed in turn with cold caches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from headwise.bench.attention_candidates import HEADWISE, chosen_backend
from headwise.bench.attention_candidates import PEERS as TORCH_PEERS
from headwise.bench.cache_candidates import CACHES
from headwise.bench.candidate import Absent, Bind, Candidate, first_line
from headwise.bench.latent_candidates import (
    LATENT_HEADWISE,
    LATENT_PEERS,
    chosen_latent_backend,
)
from headwise.bench.onnxruntime_candidate import ONNXRUNTIME
from headwise.bench.results import BesideResult, LeftOut, ShapeResult, Timed
from headwise.bench.verify import TOLERANCES, error, expected
from headwise.errors import OptionError
from headwise.measure.inputs import Cold, Inputs, LatentInputs, make_cold, make_inputs
from headwise.measure.machine import Figures
from headwise.measure.shape import Shape
from headwise.measure.timing import Ratio, Timing, interleaved, ratio

Progress = Callable[[str, int, int], object]

PEERS = (*TORCH_PEERS, ONNXRUNTIME, *CACHES)
_WARMUP = 3


@dataclass(frozen=True)
class _Entry:
    """One candidate on one shape, checked, with what it is timed on."""

    candidate: Candidate
    shape: Shape
    threads: int
    error: float
    how: str
    run: Callable[[], object]


def all_peers() -> dict[str, Candidate]:
    """Every peer by its name; one that both kinds of attention have is there once."""
    return {peer.name: peer for peer in (*LATENT_PEERS, *PEERS)}


def select_peers(names: Iterable[str], shapes: Iterable[Shape]) -> tuple[list[str], list[LeftOut]]:
    """The peers to time on these shapes, and those that this machine lacks.

    Without names it is every peer that can run; "none" is no peer.

        >>> select_peers(["none"], [])
        ([], [])

    Raises:
        OptionError: an unknown name, or one that was asked for and cannot run here, or on no shape.
    """
    asked = list(names)
    if asked == ["none"]:
        return [], []
    known = all_peers()
    for name in asked:
        if name not in known:
            raise OptionError(f"peer {name!r} is unknown; use {', '.join(known)}, or none")
    useful = {peer.name for shape in shapes for peer in _peers(shape)}
    chosen, absent = [], []
    for name in asked or known:
        if name not in useful:
            if asked:
                raise OptionError(
                    f"peer {name} computes none of these shapes ({known[name].about}); leave it "
                    "out of --peers"
                )
            continue
        reason = known[name].missing()
        if reason is None:
            chosen.append(name)
        elif asked:
            raise OptionError(f"peer {name} cannot run here: {reason}; leave it out of --peers")
        else:
            absent.append(LeftOut(name, "absent", reason))
    return chosen, absent


def bench_shape(
    shape: Shape,
    dtype: torch.dtype,
    *,
    peers: Sequence[str],
    figures: Mapping[int, Figures],
    threads: int,
    rounds: int,
    progress: Progress = lambda stage, done, total: None,
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
    entries: dict[str, _Entry] = {}
    left_out: list[LeftOut] = []
    with torch.inference_mode():
        cold = _enter(shape, dtype, peers, threads, "", entries, left_out)
        beside = shape.beside(threads)
        if beside is not None:
            _enter(beside.shape, dtype, (), beside.threads, beside.label, entries, left_out)
        turns, done = len(entries) * (rounds + _WARMUP), 0

        def before(label: str) -> None:
            nonlocal done
            torch.set_num_threads(entries[label].threads)
            progress(f"{stage}: timing", done, turns)
            done += 1

        timings = {}
        if entries:
            runs = {label: entry.run for label, entry in entries.items()}
            try:
                timings = interleaved(runs, rounds=rounds, warmup=_WARMUP, before=before)
            finally:
                torch.set_num_threads(threads)
    return ShapeResult(
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
        timed=tuple(
            _timed(label, entry, timings, figures[entry.threads], dtype)
            for label, entry in entries.items()
        ),
        left_out=tuple(left_out),
        beside=_beside(shape, threads, timings),
    )


def judged(result: ShapeResult, figures: Mapping[int, Figures]) -> ShapeResult:
    """A result whose shares of the roofline are by these figures."""
    timed = (
        replace(
            row,
            roofline=figures[row.threads].share(
                row.bytes_per_second, row.flops_per_second, result.dtype
            ),
        )
        for row in result.timed
    )
    return replace(result, timed=tuple(timed))


def _enter(
    shape: Shape,
    dtype: torch.dtype,
    peers: Sequence[str],
    threads: int,
    label: str,
    entries: dict[str, _Entry],
    left_out: list[LeftOut],
) -> Cold:
    """Check headwise and `peers` on a shape, and add each to `entries` or `left_out`."""
    inputs = make_inputs(shape, dtype)
    right = expected(shape, inputs)
    checked: list[tuple[Candidate, Bind, float]] = []
    for candidate in _candidates(shape, peers):
        name = f"{candidate.name}, {label}" if label else candidate.name
        try:
            bind = candidate.build(shape, inputs)
            if isinstance(bind, Absent):
                left_out.append(LeftOut(name, "absent", bind.reason))
                continue
            held = candidate.held
            goal = right if held is None else expected(shape, held(inputs))
            wrong = error(bind(inputs)(), goal)
        except (RuntimeError, ValueError) as problem:
            if _is_ours(candidate):
                raise
            left_out.append(LeftOut(name, "absent", first_line(problem)))
            continue
        if wrong <= TOLERANCES[dtype]:
            checked.append((candidate, bind, wrong))
        else:  # also NaN
            reason = f"error {wrong:.1e}, above the tolerance of {TOLERANCES[dtype]:g}"
            left_out.append(LeftOut(name, "wrong", reason))
    cold = make_cold(inputs)
    turns = itertools.cycle(range(len(cold.copies)))
    for candidate, bind, wrong in checked:
        name = f"{candidate.name}, {label}" if label else candidate.name
        how = candidate.about
        if _is_ours(candidate):
            how = _backend(shape, inputs)
        # every candidate takes the next copy, so that none finds what another has just read
        entries[name] = _Entry(candidate, shape, threads, wrong, how, _on_next(bind, cold, turns))
    return cold


def _on_next(bind: Bind, cold: Cold, turns: Iterator[int]) -> Callable[[], object]:
    calls = [bind(inputs) for inputs in cold.copies]
    return lambda: calls[next(turns)]()


def _candidates(shape: Shape, peers: Sequence[str]) -> list[Candidate]:
    """headwise first; of the peers those that compute this kind of attention."""
    ours = LATENT_HEADWISE if shape.latent else HEADWISE
    return [ours, *(peer for peer in _peers(shape) if peer.name in peers)]


def _peers(shape: Shape) -> tuple[Candidate, ...]:
    return (*LATENT_PEERS, *CACHES) if shape.latent else PEERS


def _is_ours(candidate: Candidate) -> bool:
    return candidate.name == HEADWISE.name


def _backend(shape: Shape, inputs: Inputs) -> str:
    if isinstance(inputs, LatentInputs):
        return chosen_latent_backend(shape, inputs)
    return chosen_backend(inputs)


def _timed(
    label: str,
    entry: _Entry,
    timings: Mapping[str, Timing],
    figures: Figures,
    dtype: torch.dtype,
) -> Timed:
    timing = timings[label]
    low, high = timing.quartiles
    size = entry.shape.bytes(dtype.itemsize, entry.candidate.bits)
    flops = entry.shape.flops
    rates = size / timing.median, flops / timing.median
    return Timed(
        name=label,
        how=entry.how,
        threads=entry.threads,
        error=entry.error,
        seconds=timing.median,
        low=low,
        high=high,
        ratio=(
            None
            if _is_ours(entry.candidate) or HEADWISE.name not in timings
            else ratio(timing, timings[HEADWISE.name])
        ),
        bytes_per_second=rates[0],
        flops_per_second=rates[1],
        roofline=figures.share(*rates, str(dtype).removeprefix("torch.")),
    )


def _beside(shape: Shape, threads: int, timings: Mapping[str, Timing]) -> BesideResult | None:
    beside = shape.beside(threads)
    if beside is None:
        return None
    ours, other = timings.get(HEADWISE.name), timings.get(f"{HEADWISE.name}, {beside.label}")
    if ours is None or other is None:
        return None
    found = ratio(ours, other)
    share = beside.shape.tokens / shape.tokens
    scaled = Ratio(found.median * share, found.low * share, found.high * share)
    return BesideResult(beside.label, beside.threads, scaled)
