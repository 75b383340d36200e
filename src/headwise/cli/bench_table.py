"""What `headwise bench` prints: the machine's figures, and a table for each shape."""

import math
import sys
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from headwise.base.console import one_line
from headwise.base.memory import gib
from headwise.bench.operators import all_peers
from headwise.bench.presets import PRESETS
from headwise.bench.results import BesideResult, LeftOut, Report, ShapeResult, Timed
from headwise.measure.machine import PRODUCTS, READS
from headwise.measure.shape import PARTS
from headwise.measure.timing import Ratio


def show_figures(report: Report) -> None:
    """Print the processor, and its bandwidth and peaks for each number of threads."""
    cpu = report.environment["cpu"]
    table = _table()
    table.add_column("threads", justify="right")
    table.add_column("read bandwidth", justify="right")
    dtypes = list(dict.fromkeys(dtype for at in report.figures for dtype in at.peaks))
    for dtype in dtypes:
        table.add_column(f"GEMM {dtype}", justify="right")
    how = []
    for at in report.figures:
        rates = [f"{at.peaks[dtype].flops_per_second / 1e9:,.0f} GFLOP/s" for dtype in dtypes]
        table.add_row(str(at.threads), f"{at.bytes_per_second / 1e9:.1f} GB/s", *rates)
        sizes = {peak.size for peak in at.peaks.values()}
        products = " and ".join(f"{size:,} x {size:,}" for size in sorted(sizes))
        how.append(
            f"best of {READS} sums over {gib(at.read_bytes)} and of {PRODUCTS} products of "
            f"{products} matrices"
        )
    title = f"{cpu['model']}, torch {report.environment['torch']}"
    title += ", its best in this run" if report.results else ""
    _print(title, table, [*dict.fromkeys(how), *_left_out(report.absent)])


def show_shape(result: ShapeResult) -> None:
    """Print one shape's table: a row a candidate, and what there is to say about them."""
    table = _table()
    for name in ("", "median", "quartiles", "vs headwise", "GB/s", "GFLOP/s", "roofline"):
        table.add_column(name, justify="right" if name else "left")
    for row in result.timed:
        table.add_row(*_cells(row))
    lines = [
        f"{result.shape}: {_bytes(result.bytes)}, {_three(result.flops / 1e9)} GFLOP, "
        f"{result.rounds} rounds"
    ]
    lines += [f"headwise runs on {row.how}" for row in result.timed if row.name == "headwise"]
    lines += [result.note] if result.note else []
    lines += _left_out(result.left_out)
    lines += [_beside(result.beside, result.threads)] if result.beside else []
    _print(f"{result.description}, {result.dtype}", table, lines)


def show_model(result: Any) -> None:
    """Print a model's table: a column a candidate, a row a figure."""
    table = _table()
    table.add_column("")
    for way in result.timed:
        table.add_column(way.name, justify="right")
    for at in zip(*(way.contexts for way in result.timed)):
        table.add_row(f"ms a token at {at[0].context:,}", *map(_milliseconds, at))
        if any(each.ratio for each in at):
            table.add_row("  vs headwise", *(_ratio(each.ratio) for each in at))
    rows = {
        "ms a 1,000 cached": _slope,
        "prefill, tokens/s": _prefill_rate,
        "peak memory": lambda way: "-" if way.peak_memory is None else gib(way.peak_memory),
        "cache": lambda way: "-" if way.cache_bytes is None else gib(way.cache_bytes),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(way) for way in result.timed))
    lines = [
        f"{gib(result.weight_bytes)} of weights; peak memory is above them, and it and prefill are "
        "at the longest context",
        f"{result.rounds} tokens each, {_threads(result.threads)}; logits checked against "
        f"stock-dynamic, tolerance {result.tolerance:g}",
        *(f"{way.name}: {way.how}" for way in result.timed),
        *_left_out(result.left_out),
    ]
    _print(f"{result.model}, {result.dtype}", table, lines)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    decimals = 2 if ratio.high < 10 else 1
    low, high = f"{ratio.low:.{decimals}f}", f"{ratio.high:.{decimals}f}"
    return f"{ratio.median:.{decimals}f}x ({low}-{high})"


def _milliseconds(at: Any) -> str:
    median, low, high = (_three(1e3 * seconds) for seconds in (at.seconds, at.low, at.high))
    return f"{median} ({low}-{high})"


def _slope(way: Any) -> str:
    return "-" if way.slope is None else _three(1e3 * way.slope)


def _prefill_rate(way: Any) -> str:
    longest = way.contexts[-1]
    return f"{longest.context / longest.prefill_seconds:,.0f}"


def show_choices() -> None:
    """Print what `--shapes` and `--peers` may be given."""
    presets = ((at.name, at.shape, at.about) for at in PRESETS)
    peers = ((name, peer.about) for name, peer in all_peers().items())
    _list("Shapes by name", ("name", "shape", "what it is"), presets)
    _list("Shapes as parts joined by colons", ("part", "meaning"), PARTS)
    _list("Peers", ("name", "what it is"), peers)


def _list(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = _table()
    for column in columns:
        table.add_column(column, no_wrap=column == "shape")
    for row in rows:
        table.add_row(*row)
    _print(title, table, [])


def _cells(row: Timed) -> tuple[str, ...]:
    return (
        row.name,
        f"{_three(1e3 * row.seconds)} ms",
        f"{_three(1e3 * row.low)}-{_three(1e3 * row.high)}",
        _ratio(row.ratio),
        _three(row.bytes_per_second / 1e9),
        _three(row.flops_per_second / 1e9),
        f"{row.roofline:.0%}",
    )


def _beside(found: BesideResult, threads: int) -> str:
    if found.threads != threads:
        low, high = 1 / found.ratio.high, 1 / found.ratio.low
        return (
            f"headwise with {_threads(threads)} is {1 / found.ratio.median:.2f} "
            f"({low:.2f}-{high:.2f}) times as fast as with {_threads(found.threads)}"
        )
    low, high = found.ratio.low, found.ratio.high
    return (
        f"headwise takes {found.ratio.median:.2f} ({low:.2f}-{high:.2f}) times as long a cached "
        f"token as at {found.label}"
    )


def _three(number: float) -> str:
    """A number with three digits, and all those before its point.

    >>> _three(12345.6), _three(98.76), _three(0.01234), _three(-0.5)
    ('12,346', '98.8', '0.0123', '-0.500')
    """
    size = abs(number)
    decimals = 2 if not size else max(0, 2 - math.floor(math.log10(size)))
    return f"{number:,.{decimals}f}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _left_out(found: Iterable[LeftOut]) -> list[str]:
    return [
        f"{at.name} {'gave a WRONG result' if at.state == 'wrong' else 'not timed'}: {at.reason}"
        for at in found
    ]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _print(title: str, table: Table, lines: Iterable[str]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.print(escape(one_line(title)), style="bold")
    console.print(table)
    for line in lines:
        console.print(Padding(escape(one_line(line)), (0, 0, 0, 2), expand=False))
    console.print()
