"""`headwise bench`: how fast headwise is here, next to its peers and to what the machine can do."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.base import units
from headwise.cli.options import (
    Json,
    Model,
    Named,
    TrustRemoteCode,
    print_json,
    the_model,
    words,
)
from headwise.cli.terminal import screen
from headwise.errors import OptionError

ROUNDS = 21

Dtypes = Annotated[
    str | None,
    typer.Option(
        "--dtypes",
        "--dtype",
        help="float32, bfloat16, float16 (or fp32, bf16, fp16), joined by commas. Default: each "
        "shape's own; for a model bfloat16; for the machine all.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Default: as many as PyTorch takes.", show_default=False)
]
Rounds = Annotated[int, typer.Option(help="How often each candidate is timed, in turn.")]
Out = Annotated[Path | None, typer.Option(help="A JSON file for the results.", show_default=False)]

bench = typer.Typer(name="bench")


@bench.callback(invoke_without_command=True)
def _before(context: typer.Context) -> None:
    """Measure operators, a model, or the machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def machine(
    *, dtypes: Dtypes = None, threads: Threads = None, out: Out = None, as_json: Json = False
) -> int:
    """Measure the read bandwidth and the GEMM peak."""
    from headwise.bench import Report
    from headwise.cli.bench_table import show_figures
    from headwise.measure import measure_machine
    from headwise.measure.machine_kept import keep_figures

    chosen, count = _dtypes(dtypes) or ["float32", "bfloat16", "float16"], _threads(threads)
    _check_out(out)
    report = Report(_command("machine", dtypes=dtypes, threads=count))
    with _kept(report, out), screen(animated=False) as shown:
        report.figures.append(measure_machine(count, chosen, progress=shown))
    if report.figures:
        keep_figures(report.figures[0])
        if not as_json:
            show_figures(report)
    return _end(report, as_json)


@bench.command()
def ops(
    *,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Names or shapes, joined by commas, as llama3-decode,decode:9/3:d64:2k. "
            "Default: every name. See --list.",
            show_default=False,
        ),
    ] = None,
    dtypes: Dtypes = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Peers to time beside headwise, joined by commas, or none. Default: all that run "
            "here. See --list.",
            show_default=False,
        ),
    ] = None,
    rounds: Rounds = ROUNDS,
    threads: Threads = None,
    out: Out = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png or .svg file for a roofline plot.", show_default=False),
    ] = None,
    as_json: Json = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Show the names of shapes and peers, and the syntax.")
    ] = False,
) -> int:
    """Time the operators on shapes of attention, next to their peers."""
    import torch

    from headwise.base.plot import check_plot
    from headwise.base.written import check_writable
    from headwise.bench import Report, bench_shape, judged, select_peers, select_shapes
    from headwise.bench.roofline import write_plot
    from headwise.cli.bench_table import show_choices, show_figures, show_shape
    from headwise.measure import measure_machine
    from headwise.measure.inputs import check_fits
    from headwise.measure.machine import check_threads, use_threads
    from headwise.measure.timing import check_rounds

    if list_all:
        show_choices()
        return 0
    chosen = select_shapes(words(shapes), _dtypes(dtypes))
    count = _threads(threads)
    check_rounds(rounds)
    _check_out(out)
    if plot is not None:
        check_plot(plot)
        check_writable(plot)
    for shape, names in chosen:
        check_threads(shape.vs_threads)
        for name in names:
            check_fits(shape, getattr(torch, name))
    report = Report(
        _command("ops", shapes=shapes, dtypes=dtypes, peers=peers, rounds=rounds, threads=count)
    )
    with _kept(report, out), use_threads(count), screen(animated=False) as shown:
        shown("looking for peers", 0, 0)
        able, absent = select_peers(words(peers), [shape for shape, _ in chosen])
        report.absent.extend(absent)
        beside = [shape.vs_threads for shape, _ in chosen if shape.vs_threads is not None]
        needed = ["float32", *(name for _, names in chosen for name in names)]
        figures = {
            number: measure_machine(number, needed, progress=shown)
            for number in dict.fromkeys([count, *beside])
        }
        report.figures = before = list(figures.values())
        shown.close()
        if not as_json:
            show_figures(report)
        for shape, names in chosen:
            for name in names:
                result = bench_shape(
                    shape,
                    getattr(torch, name),
                    peers=able,
                    figures=figures,
                    threads=count,
                    rounds=rounds,
                    progress=shown,
                )
                report.results.append(result)
                # The machine may have been busy before: its best of the run is what it can do.
                for number in {row.threads for row in result.timed}:
                    known = figures[number]
                    again = measure_machine(number, [known.binding(name)], progress=shown)
                    figures[number] = known.best_with(again)
                report.figures = list(figures.values())
                report.results = [judged(at, figures) for at in report.results]
                shown.close()
                if not as_json:
                    show_shape(report.results[-1])
        if report.figures != before and not as_json:
            show_figures(report)
    if plot is not None and report.results:
        write_plot(report, plot)
    return _end(report, as_json)


@bench.command()
def model(
    model: Model = None,
    *,
    named: Named = None,
    contexts: Annotated[
        str, typer.Option(help="Tokens in the cache before the timed ones, joined by commas.")
    ] = "100,2000,8000",
    dtypes: Dtypes = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="stock-dynamic, stock-static (by their caches), openvino (of a .gguf file, where "
            "openvino-genai is installed), joined by commas, or none. Default: all that run here.",
            show_default=False,
        ),
    ] = None,
    rounds: Rounds = ROUNDS,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Time a model at several contexts, next to stock Transformers."""
    from headwise.bench import Report
    from headwise.bench.models import bench_model, open_model, select_model_peers
    from headwise.cli.bench_table import show_model
    from headwise.loading.progress import quiet_transformers
    from headwise.measure.machine import use_threads
    from headwise.measure.timing import check_rounds

    names, lengths = (
        _dtypes(dtypes) or ["bfloat16"],
        units.token_counts("--contexts", contexts),
    )
    model = the_model(model, named)
    able, count = select_model_peers(words(peers)), _threads(threads)
    check_rounds(rounds)
    _check_out(out)
    report = Report(
        _command(
            "model",
            *([model] if model is not None else []),
            contexts=contexts,
            dtypes=dtypes,
            peers=peers,
            rounds=rounds,
            threads=count,
        )
    )
    with _kept(report, out), use_threads(count), quiet_transformers():
        for dtype in names:
            with screen(animated=True) as loading:
                loading("starting", 0, 0)
                name, loaded, gguf = open_model(
                    model,
                    dtype=dtype,
                    contexts=lengths,
                    rounds=rounds,
                    trust_remote_code=trust_remote_code,
                    progress=loading,
                )
            with screen(animated=False) as shown:
                result = bench_model(
                    name, loaded, gguf, contexts=lengths, peers=able, rounds=rounds, progress=shown
                )
            report.results.append(result)
            if not as_json:
                show_model(result)
    return _end(report, as_json)


def _dtypes(text: str | None) -> list[str]:
    from headwise.loading.load import DTYPES, known_dtype

    names = [known_dtype(word) for word in words(text)]
    if "auto" in names:
        raise OptionError(f"dtype 'auto' is not for bench; use {', '.join(DTYPES)}")
    return list(dict.fromkeys(names))


def _threads(threads: int | None) -> int:
    from headwise.measure.machine import check_threads

    return check_threads(threads)


def _check_out(out: Path | None) -> None:
    from headwise.base.written import check_writable

    if out is not None:
        check_writable(out)


def _command(name: str, *arguments: str, **options: Any) -> str:
    """The command line that repeats this run."""
    line = ["headwise", "bench", name, *arguments]
    for option, value in options.items():
        if value is not None:
            line += [f"--{option}", str(value)]
    return shlex.join(line)


@contextmanager
def _kept(report: Any, out: Path | None) -> Iterator[None]:
    """Write what was measured also when the run is interrupted, or ends in an error."""
    try:
        yield
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        if out is not None and (report.figures or report.results):
            report.write(out)


def _end(report: Any, as_json: bool) -> int:
    """The exit code of a run that is over; prints it where JSON is asked for."""
    if as_json:
        print_json(asdict(report))
    if report.interrupted:
        typer.echo("headwise: interrupted", err=True)
        return 130
    return 1 if any(result.headwise_wrong for result in report.results) else 0
