"""Whole benchmarks: everything is checked before any work, and all that is measured is reported.

Ctrl-C ends a benchmark early: its report has what was finished until then, and `interrupted`.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headwise.base.figure import write_figure
from headwise.base.plot import check_plot
from headwise.base.progress import Progress, silent
from headwise.base.written import check_writable
from headwise.bench.operators import bench_shape, judged
from headwise.bench.peers import check_names, select_peers
from headwise.bench.presets import CONTEXTS, select_shapes
from headwise.bench.results import ModelResult, Report, ShapeResult
from headwise.errors import OptionError
from headwise.loading.options import DTYPES, known_dtype
from headwise.measure.figures_store import keep_figures
from headwise.measure.inputs import check_fits
from headwise.measure.machine import Figures, check_threads, measure_machine, use_threads
from headwise.measure.timing import ROUNDS, check_rounds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every benchmark may be told.

    Args:
        dtypes: names, as "float32" or "fp32"; without them what the benchmark has by itself.
        peers: names of peers; without them all that run here, and none for "none".
        rounds: how often each candidate is timed.
        threads: of PyTorch; None for as many as it takes.
        out: a JSON file for the report.
        progress: called with a stage and how far it is.

    Raises:
        OptionError: says which of them cannot be.
    """

    dtypes: Sequence[str] = ()
    peers: Sequence[str] = ()
    rounds: int = ROUNDS
    threads: int | None = None
    out: Path | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        if "auto" in self.dtype_names():
            raise OptionError(f"dtype 'auto' is not for bench; use {', '.join(DTYPES)}")
        check_threads(self.threads)
        check_rounds(self.rounds)
        if self.out is not None:
            check_writable(self.out)

    def dtype_names(self) -> list[str]:
        """The dtypes by their full names, each once."""
        return list(dict.fromkeys(known_dtype(name) for name in self.dtypes))

    def report(self, name: str, *arguments: str, **options: str | int) -> Report:
        """An empty report, with the command line that repeats this benchmark."""
        line = ["headwise", "bench", name, *arguments]
        options["dtypes"] = ",".join(self.dtypes)
        if name != "machine":
            options |= {"peers": ",".join(self.peers), "rounds": self.rounds}
        options["threads"] = check_threads(self.threads)
        for option, value in options.items():
            if value != "":
                line += [f"--{option}", str(value)]
        return Report(shlex.join(line))


def bench_machine(settings: Settings) -> Report:
    """Measure the machine's read bandwidth and GEMM peaks, and keep them for `headwise.plan`."""
    dtypes = settings.dtype_names() or ["float32", "bfloat16", "float16"]
    threads = check_threads(settings.threads)
    report = settings.report("machine")
    with report.recording(settings.out):
        report.figures.append(measure_machine(threads, dtypes, progress=settings.progress))
    if report.figures:
        keep_figures(report.figures[0])
    return report


def bench_operators(
    shapes: Sequence[str],
    settings: Settings,
    *,
    plot: Path | None = None,
    on_figures: Callable[[Report], object] = lambda report: None,
    on_result: Callable[[ShapeResult], object] = lambda result: None,
) -> Report:
    """Time the operators on shapes, next to their peers and to what the machine can do.

    Args:
        shapes: names of `PRESETS`, or shapes as `parse_shape` reads them; all names for none.
        settings: each shape is run in the dtypes that they have, else in its own.
        plot: a .png or .svg file for a roofline plot.
        on_figures: called when the machine's figures are known, and at the end if they got better.
        on_result: called with the result of each shape and dtype.

    Raises:
        OptionError: says which argument cannot be.
        CapacityError: a shape does not fit in memory.
        UnsupportedError: a plot, without Matplotlib.
    """
    chosen, progress = select_shapes(shapes, settings.dtype_names()), settings.progress
    threads = check_threads(settings.threads)
    if plot is not None:
        check_plot(plot)
    for shape, dtype in chosen:
        check_threads(shape.vs_threads)
        check_fits(shape, getattr(torch, dtype))
    report = settings.report("ops", shapes=",".join(shapes))
    with report.recording(settings.out), use_threads(threads):
        progress("looking for peers", 0, 0)
        peers, report.absent = select_peers(settings.peers, [shape for shape, _ in chosen])
        beside = [shape.vs_threads for shape, _ in chosen if shape.vs_threads is not None]
        needed = ["float32", *(dtype for _, dtype in chosen)]
        figures = {
            count: measure_machine(count, needed, progress=progress)
            for count in dict.fromkeys([threads, *beside])
        }
        report.figures = before = list(figures.values())
        on_figures(report)
        for shape, dtype in chosen:
            result = bench_shape(
                shape,
                getattr(torch, dtype),
                peers=peers,
                figures=figures,
                threads=threads,
                rounds=settings.rounds,
                progress=progress,
            )
            report.results.append(result)
            _measure_again(figures, result, progress)
            report.figures = list(figures.values())
            report.results = [judged(each, figures) for each in report.results]
            on_result(report.results[-1])
        if report.figures != before:
            on_figures(report)
    if plot is not None and report.results:
        from headwise.bench.roofline import draw

        write_figure(draw(report), plot)
    return report


def bench_models(
    model: str | None,
    settings: Settings,
    *,
    contexts: Sequence[int] = CONTEXTS,
    trust_remote_code: bool = False,
    loading: Progress = silent,
    on_result: Callable[[ModelResult], object] = lambda result: None,
) -> Report:
    """Time a model (None: the demo model) at several contexts, next to stock Transformers.

    Args:
        model: a folder, a .gguf file or a hub id.
        settings: without dtypes the model is run in bfloat16.
        contexts: tokens in the cache before the timed ones.
        trust_remote_code: run code that comes with the model.
        loading: called as the settings' progress, while the model is loaded.
        on_result: called with the result in each dtype.

    Raises:
        OptionError: says which argument cannot be.
        LoadError, ShapeError, CapacityError: as `headwise.bench.models.open_model`.
    """
    from headwise.bench.model_candidates import PEERS
    from headwise.bench.models import bench_model, open_model

    peers = check_names(settings.peers, PEERS)
    named = [] if model is None else [model]
    report = settings.report("model", *named, contexts=",".join(map(str, contexts)))
    with report.recording(settings.out), use_threads(check_threads(settings.threads)):
        for dtype in settings.dtype_names() or ["bfloat16"]:
            loading("starting", 0, 0)
            opened = open_model(
                model,
                dtype=dtype,
                contexts=contexts,
                rounds=settings.rounds,
                trust_remote_code=trust_remote_code,
                progress=loading,
            )
            result = bench_model(
                *opened,
                contexts=contexts,
                peers=peers,
                rounds=settings.rounds,
                progress=settings.progress,
            )
            report.results.append(result)
            on_result(result)
    return report


def _measure_again(figures: dict[int, Figures], result: ShapeResult, progress: Progress) -> None:
    """The machine may have been busy before: its best of the run is what it can do."""
    for threads in {row.threads for row in result.timed}:
        known = figures[threads]
        again = measure_machine(threads, [known.binding(result.dtype)], progress=progress)
        figures[threads] = known.best_with(again)
