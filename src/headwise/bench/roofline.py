"""The roofline plot: what each candidate computes per second, under what the machine could.

One panel per shape and dtype, all on the same axes. Bytes and FLOPs are what the shape needs, so
that the candidates of a panel stand above one another and their distance is their ratio of time.
The legend beside a panel names them in that order, the fastest first.

Source: Williams, Waterman, Patterson 2009, doi 10.1145/1498765.1498785.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwise.base.console import counted
from headwise.base.figure import style_axes
from headwise.base.plot import plain, style
from headwise.bench.results import Report, ShapeResult, is_headwise
from headwise.measure.machine import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT = 8.0
_COLUMNS = 3
# Inches of one panel with its legend.
_WIDTH, _HEIGHT = 4.4, 3.0

Limits = tuple[float, float]


def draw(report: Report) -> "Figure":
    """The results of `bench ops` as a Matplotlib figure."""
    from matplotlib.figure import Figure

    results: list[ShapeResult] = [result for result in report.results if result.timed]
    columns = max(1, min(_COLUMNS, len(results)))
    rows = max(1, math.ceil(len(results) / columns))
    figure = Figure(figsize=(columns * _WIDTH, rows * _HEIGHT + 0.4), layout="constrained")
    figures = {each.threads: each for each in report.figures}
    across, up = _limits(results, figures)
    styles = _styles(results)
    for index, result in enumerate(results):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set(xscale="log", yscale="log", xlim=across, ylim=up)
        _draw_roofs(axes, result, figures, across)
        _draw_points(axes, result, styles)
        _decorate(axes, result)
    machine = f"{report.environment['cpu']['model']}, torch {report.environment['torch']}"
    figure.suptitle(plain(machine), x=0.01, ha="left", fontsize=_FONT + 1, parse_math=False)
    return figure


def _limits(results: Sequence[ShapeResult], figures: dict[int, Figures]) -> tuple[Limits, Limits]:
    """The range of both axes that holds every point, every ridge and every roof."""
    rows = [row for result in results for row in result.timed]
    across = [row.flops_per_second / row.bytes_per_second for row in rows]
    up = [row.flops_per_second for row in rows]
    for result in results:
        for threads in {row.threads for row in result.timed}:
            peak = figures[threads].peak(result.dtype)
            across.append(peak / figures[threads].bytes_per_second)
            up.append(peak)
    return (min(across) / 4, max(across) * 4), (min(up) / 3, max(up) * 3)


def _styles(results: Sequence[ShapeResult]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each candidate, the same in all panels; headwise has the first."""
    names = dict.fromkeys(row.name.partition(",")[0] for result in results for row in result.timed)
    ordered = sorted(names, key=lambda name: not is_headwise(name))
    return {name: style(index) for index, name in enumerate(ordered)}


def _draw_roofs(
    axes: "Axes", result: ShapeResult, figures: dict[int, Figures], across: Limits
) -> None:
    """The roof of each number of threads; dashed where it is not the run's own."""
    left, right = across
    for threads in sorted({row.threads for row in result.timed}, reverse=True):
        rate, peak = figures[threads].bytes_per_second, figures[threads].peak(result.dtype)
        own = threads == result.threads
        label = f"{rate / 1e9:,.1f} GB/s, {peak / 1e9:,.0f} GFLOP/s"
        axes.plot(
            [left, peak / rate, right],
            [left * rate, peak, peak],
            "-" if own else "--",
            color="0.35",
            lw=1.2,
            label=label if own else f"with {counted(threads, 'thread')}\n{label}",
        )


def _draw_points(axes: "Axes", result: ShapeResult, styles: dict[str, tuple[str, str]]) -> None:
    for row in sorted(result.timed, key=lambda row: row.flops_per_second, reverse=True):
        colour, marker = styles[row.name.partition(",")[0]]
        axes.plot(
            row.flops_per_second / row.bytes_per_second,
            row.flops_per_second,
            marker,
            color=colour,
            markerfacecolor=colour if row.name == row.name.partition(",")[0] else "white",
            markersize=5.5,
            zorder=3 if is_headwise(row.name) else 2,
            label=f"{row.name}  {1e3 * row.seconds:.3g} ms",
        )


def _decorate(axes: "Axes", result: ShapeResult) -> None:
    # in two lines, broken at a comma
    parts = f"{result.description}, {result.dtype}".split(", ")
    half = math.ceil(len(parts) / 2)
    title = ", ".join(parts[:half]) + ",\n" + ", ".join(parts[half:])
    style_axes(axes, _FONT, title=title, across="FLOP/byte", up="FLOP/s")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1, 1),
        fontsize=_FONT - 1,
        frameon=False,
        handlelength=1.5,
        borderaxespad=0.3,
    )
