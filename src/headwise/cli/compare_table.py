"""What `headwise compare` ends with: a column a mechanism, a row a figure, and the verdict."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from headwise.base.console import one_line
from headwise.comparison import Comparison, Speed
from headwise.comparison.experiment import FIGURE
from headwise.comparison.task import Metric
from headwise.comparison.verdict import SeedScores

_METRICS: tuple[Metric, ...] = ("accuracy", "loss")


def show(found: Comparison, out: Path) -> None:
    """Print what is finished to stdout."""
    console = Console(file=sys.stdout, highlight=False)
    console.print(escape(one_line(_title(found))), style="bold")
    console.print(_table(found))
    for line in _lines(found, out):
        console.print(Padding(escape(one_line(line)), (0, 0, 0, 2), expand=False))
    console.print()


def _title(found: Comparison) -> str:
    at = found.configuration
    what = "text" if at.task == "text" else f"recall of {at.pairs} pairs"
    done = f"{len(found.runs)} of {len(at.mechanisms) * at.seeds} runs"
    return f"{what}, {at.layers} layers of {at.heads} x {at.head_dim} dims, {done}"


def _table(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in found.configuration.mechanisms:
        table.add_column(escape(name), justify="right")
    for title, cells in _rows(found):
        table.add_row(title, *cells)
    return table


def _rows(found: Comparison) -> Iterable[tuple[str, list[str]]]:
    rows = found.rows()
    for metric in _METRICS:
        known = {at.mechanism: at for at in found.qualities(metric)}
        qualities = [known.get(row["mechanism"]) for row in rows]
        yield metric, [_quality(at, lambda each: each.mean) for at in qualities]
        if found.configuration.seeds > 1 and metric == found.metric:
            yield (
                "  deviation of seeds",
                [_quality(at, lambda each: each.deviation) for at in qualities],
            )
            yield "  lowest seed", [_quality(at, lambda each: min(each.values)) for at in qualities]
            yield (
                "  highest seed",
                [_quality(at, lambda each: max(each.values)) for at in qualities],
            )
    yield "cache bytes a token", _cells(found, lambda speed: f"{speed.cache_bytes_per_token:,}")
    for at, context in enumerate(_contexts(found)):
        yield f"decode at {context:,}", _cells(found, partial(_decode, at))
    yield "training tokens/s", _cells(found, _training)
    yield "peak memory, MiB", _cells(found, _peak)
    yield "parameters", [f"{row['parameters']:,}" for row in rows]
    yield "MLP width", [f"{row['feed_forward']:,}" for row in rows]


def _lines(found: Comparison, out: Path) -> Iterable[str]:
    at = found.configuration
    plain = "any value of the sequence" if at.task == "recall" else "the frequency of each byte"
    yield f"{found.metric} by {plain}: {found.baseline:.3f}"
    if found.speeds:
        threads = "1 thread" if at.threads == 1 else f"{at.threads} threads"
        yield f"decode: tokens/s of one sequence behind so many, float32, {threads}"
        yield f"peak memory is that of a training step of {at.batch:,} tokens, above the weights"
    yield from found.verdict()
    drawn = ", figure.svg" if (out.expanduser() / FIGURE).exists() else ""
    yield f"in {out}: results.json, results.csv{drawn}"
    if found.complete and not drawn:
        yield "no figure: it needs Matplotlib; pip install 'headwise[bench]', then run this again"


def _contexts(found: Comparison) -> list[int]:
    return [at.context for at in found.speeds[0].decode] if found.speeds else []


def _cells(found: Comparison, cell: Callable[[Speed], str]) -> list[str]:
    known = {at.mechanism: at for at in found.speeds}
    return [cell(known[name]) if name in known else "-" for name in found.configuration.mechanisms]


def _quality(quality: SeedScores | None, figure: Callable[[SeedScores], float | None]) -> str:
    number = None if quality is None else figure(quality)
    return "-" if number is None else f"{number:.3f}"


def _decode(at: int, speed: Speed) -> str:
    return f"{speed.decode[at].rate.tokens_per_second:,.0f}"


def _training(speed: Speed) -> str:
    return f"{speed.training.tokens_per_second:,.0f}"


def _peak(speed: Speed) -> str:
    return "-" if speed.peak_memory is None else f"{speed.peak_memory / 2**20:.1f}"
