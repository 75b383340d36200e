"""`headwise bench`: how fast headwise is here, next to its peers and to what the machine can do."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from headwise.base import units
from headwise.cli import options
from headwise.cli.documented import documented
from headwise.cli.terminal import Screen, interrupted, screen

if TYPE_CHECKING:
    from headwise.bench import Report

_Result = TypeVar("_Result")

ROUNDS = 21

Dtypes = Annotated[
    str | None,
    typer.Option(
        "--dtypes",
        "--dtype",
        help="float32, bfloat16, float16 (or fp32, bf16, fp16), joined by commas. Default: each "
        "shape's own; for a model bfloat16; for the machine all.",
    ),
]
bench = typer.Typer(name="bench")


@bench.callback(invoke_without_command=True)
def _before(context: typer.Context) -> None:
    """Measure operators, a model, or the machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
@documented
def machine(
    *,
    dtypes: Dtypes = None,
    threads: int | None = None,
    out: Path | None = None,
    as_json: options.Json = False,
) -> int:
    """Measure the read bandwidth and the GEMM peak.

    Args:
        threads: Default: as many as PyTorch takes.
        out: A JSON file for the results.
    """
    from headwise.bench import Settings, bench_machine
    from headwise.cli.bench_table import show_figures

    with screen(animated=False) as shown:
        settings = Settings(dtypes=options.words(dtypes), threads=threads, out=out, progress=shown)
        report = bench_machine(settings)
    if report.figures and not as_json:
        show_figures(report)
    return _end(report, as_json)


@bench.command()
@documented
def ops(
    *,
    shapes: str | None = None,
    dtypes: Dtypes = None,
    peers: str | None = None,
    rounds: int = ROUNDS,
    threads: int | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    as_json: options.Json = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Show the names of shapes and peers, and the syntax.")
    ] = False,
) -> int:
    """Time the operators on shapes of attention, next to their peers.

    Args:
        shapes: Names or shapes, joined by commas, as llama3-decode,decode:9/3:d64:2k. Default:
            every name. See --list.
        peers: Peers to time beside headwise, joined by commas, or none. Default: all that run here.
            See --list.
        rounds: How often each candidate is timed, in turn.
        threads: Default: as many as PyTorch takes.
        out: A JSON file for the results.
        plot: A .png or .svg file for a roofline plot.
    """
    from headwise.bench import Settings, bench_operators
    from headwise.cli.bench_table import show_choices, show_figures, show_shape

    if list_all:
        show_choices()
        return 0
    with screen(animated=False) as shown:
        settings = Settings(
            dtypes=options.words(dtypes),
            peers=options.words(peers),
            rounds=rounds,
            threads=threads,
            out=out,
            progress=shown,
        )
        report = bench_operators(
            options.words(shapes),
            settings,
            plot=plot,
            on_figures=_printed(show_figures, shown, as_json),
            on_result=_printed(show_shape, shown, as_json),
        )
    return _end(report, as_json)


@bench.command()
@documented
def model(
    model: options.Model = None,
    *,
    named: options.Named = None,
    contexts: str = "100,2000,8000",
    dtypes: Dtypes = None,
    peers: str | None = None,
    rounds: int = ROUNDS,
    threads: int | None = None,
    out: Path | None = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> int:
    """Time a model at several contexts, next to stock Transformers.

    Args:
        contexts: Tokens in the cache before the timed ones, joined by commas.
        peers: stock-dynamic, stock-static (by their caches); of a .gguf file, on whose blocks
            headwise itself runs, also headwise-float (on dequantised weights, as the stock peers)
            and, where they are installed, openvino and llama.cpp (packages openvino-genai and
            xllamacpp); joined by commas, or none. Default: all that run here.
        rounds: How often each candidate is timed, in turn.
        threads: Default: as many as PyTorch takes.
        out: A JSON file for the results.
    """
    from headwise.bench import Settings, bench_models
    from headwise.cli.bench_table import show_model
    from headwise.loading.progress import quiet_transformers

    lengths, model = units.token_counts("--contexts", contexts), options.the_model(model, named)
    with quiet_transformers(), screen(animated=True) as loading, screen(animated=False) as shown:

        def timing(stage: str, done: int, total: int) -> None:
            loading.close()
            shown(stage, done, total)

        settings = Settings(
            dtypes=options.words(dtypes),
            peers=options.words(peers),
            rounds=rounds,
            threads=threads,
            out=out,
            progress=timing,
        )
        report = bench_models(
            model,
            settings,
            contexts=lengths,
            trust_remote_code=trust_remote_code,
            loading=loading,
            on_result=_printed(show_model, shown, as_json),
        )
    return _end(report, as_json)


def _printed(
    show: Callable[[_Result], None], shown: Screen, as_json: bool
) -> Callable[[_Result], None]:
    """Print a result as it comes, the progress bar out of its way; nothing where JSON is asked."""

    def tell(result: _Result) -> None:
        shown.close()
        if not as_json:
            show(result)

    return tell


def _end(report: "Report", as_json: bool) -> int:
    """The exit code of a benchmark that is over; prints it where JSON is asked for."""
    if as_json:
        options.print_json(asdict(report))
    if report.interrupted:
        return interrupted()
    return 1 if any(result.headwise_wrong for result in report.results) else 0
