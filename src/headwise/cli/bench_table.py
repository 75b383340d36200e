"""What `headwise bench` prints: the machine's figures, and a table for each shape or model."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from headwise.base.console import counted
from headwise.base.memory import gib
from headwise.bench import results
from headwise.bench.peers import all_peers
from headwise.bench.presets import PRESETS
from headwise.cli.tables import columns, show_table, three_digits
from headwise.measure.machine import PRODUCTS, READS
from headwise.measure.shape import PARTS
from headwise.measure.timing import Ratio

_Figure = TypeVar("_Figure")


def show_figures(report: results.Report) -> None:
    """Print the processor, and its bandwidth and peaks for each number of threads."""
    cpu = report.environment["cpu"]
    dtypes = list(dict.fromkeys(dtype for each in report.figures for dtype in each.peaks))
    rows, how = [], []
    for figures in report.figures:
        peaks = [figures.peaks[dtype] for dtype in dtypes]
        rates = [f"{peak.flops_per_second / 1e9:,.0f} GFLOP/s" for peak in peaks]
        read = f"{figures.bytes_per_second / 1e9:.1f} GB/s"
        rows.append([str(figures.threads), read, *rates])
        sizes = sorted({peak.size for peak in peaks})
        products = " and ".join(f"{size:,} x {size:,}" for size in sizes)
        how.append(
            f"best of {READS} sums over {gib(figures.read_bytes)} and of {PRODUCTS} products of "
            f"{products} matrices"
        )
    names = ["threads", "read bandwidth", *(f"GEMM {dtype}" for dtype in dtypes)]
    title = f"{cpu['model']}, torch {report.environment['torch']}"
    title += ", its best in this run" if report.results else ""
    show_table(title, columns(names, rows), [*dict.fromkeys(how), *_left_out(report.absent)])


def show_shape(result: results.ShapeResult) -> None:
    """Print one shape's table: a row per candidate, and what there is to say about them."""
    names = ("", "median", "quartiles", "vs headwise", "GB/s", "GFLOP/s", "roofline")
    lines = [
        f"{result.shape}: {_bytes(result.bytes)}, {three_digits(result.flops / 1e9)} GFLOP, "
        f"{result.rounds} rounds"
    ]
    lines += [f"headwise runs on {row.how}" for row in result.timed if row.name == "headwise"]
    lines += [result.note] if result.note else []
    lines += _left_out(result.left_out)
    lines += [_beside(result.beside, result.threads)] if result.beside else []
    table = columns(names, map(_shape_row, result.timed))
    show_table(f"{result.description}, {result.dtype}", table, lines)


def show_model(result: results.ModelResult) -> None:
    """Print a model's table: a column per candidate, a row per figure."""
    rows = []
    for each in zip(*(way.contexts for way in result.timed)):
        rows.append([f"ms per token at {each[0].context:,}", *map(_milliseconds, each)])
        if any(at_context.ratio for at_context in each):
            rows.append(["  vs headwise", *(_ratio(at_context.ratio) for at_context in each)])
    figures: dict[str, Callable[[results.ModelTimed], str]] = {
        "ms per 1,000 cached": lambda way: _known(
            way.slope, lambda slope: three_digits(1e3 * slope)
        ),
        "prefill, tokens/s": _prefill_rate,
        "peak memory": lambda way: _known(way.peak_memory, gib),
        "cache": lambda way: _known(way.cache_bytes, gib),
    }
    rows += [[name, *map(figure, result.timed)] for name, figure in figures.items()]
    lines = [
        f"{gib(result.weight_bytes)} of weights; peak memory is above them, and it and prefill are "
        "at the longest context",
        f"{result.rounds} tokens each, {counted(result.threads, 'thread')}; logits checked against "
        f"stock-dynamic, tolerance {result.tolerance:g}",
        *(f"{way.name}: {way.how}" for way in result.timed),
        *_left_out(result.left_out),
    ]
    table = columns(["", *(way.name for way in result.timed)], rows)
    show_table(f"{result.model}, {result.dtype}", table, lines)


def show_choices() -> None:
    """Print what `--shapes` and `--peers` may be given."""
    presets = [(preset.name, preset.shape, preset.about) for preset in PRESETS]
    peers = [(name, peer.about) for name, peer in all_peers().items()]
    for title, names, rows in (
        ("Shapes by name", ("name", "shape", "what it is"), presets),
        ("Shapes as parts joined by colons", ("part", "meaning"), PARTS),
        ("Peers", ("name", "what it is"), peers),
    ):
        show_table(title, columns(names, rows, left=names, no_wrap=("shape",)))


def _shape_row(row: results.Timed) -> tuple[str, ...]:
    return (
        row.name,
        f"{three_digits(1e3 * row.seconds)} ms",
        f"{three_digits(1e3 * row.low)}-{three_digits(1e3 * row.high)}",
        _ratio(row.ratio),
        three_digits(row.bytes_per_second / 1e9),
        three_digits(row.flops_per_second / 1e9),
        f"{row.roofline:.0%}",
    )


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio:{'.2f' if ratio.high < 10 else '.1f'}}"


def _milliseconds(at_context: results.AtContext) -> str:
    times = (at_context.seconds, at_context.low, at_context.high)
    median, low, high = (three_digits(1e3 * seconds) for seconds in times)
    return f"{median} ({low}-{high})"


def _prefill_rate(way: results.ModelTimed) -> str:
    longest = way.contexts[-1]
    return f"{longest.context / longest.prefill_seconds:,.0f}"


def _known(figure: _Figure | None, words: Callable[[_Figure], str]) -> str:
    return "-" if figure is None else words(figure)


def _beside(beside: results.BesideResult, count: int) -> str:
    ratio = beside.ratio
    if beside.threads != count:
        return (
            f"headwise with {counted(count, 'thread')} is {1 / ratio.median:.2f} "
            f"({1 / ratio.high:.2f}-{1 / ratio.low:.2f}) times as fast as with "
            f"{counted(beside.threads, 'thread')}"
        )
    return (
        f"headwise takes {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) times as long per "
        f"cached token as at {beside.label}"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _left_out(left_out: Iterable[results.LeftOut]) -> list[str]:
    states = {"absent": "not timed", "wrong": "gave a WRONG result"}
    return [f"{each.name} {states[each.state]}: {each.reason}" for each in left_out]
