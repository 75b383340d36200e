"""The roofline plot: what each candidate computes a second, under what the machine could.

One panel a shape and dtype, all on the same axes. Bytes and FLOPs are what the shape needs, so that
the candidates of a panel stand above one another and their distance is their ratio of time.

Source: Williams, Waterman, Patterson 2009, doi 10.1145/1498765.1498785.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwise.base.plot import STYLES, plain, spread
from headwise.base.written import write_whole
from headwise.bench.results import Report, ShapeResult
from headwise.measure.machine import Figures

_FONT = 8.0
_COLUMNS = 3
# Inches of one panel's axes, and of what is around them.
_WIDTH, _HEIGHT = 3.1, 2.5
_LEFT, _RIGHT, _BOTTOM, _TOP, _TITLE = 0.65, 0.15, 0.5, 0.45, 0.4


def write_plot(report: Report, path: Path) -> None:
    """Draw the results of `bench ops` as .png or .svg, whole or not at all.

    Raises:
        OptionError: the file cannot be written.
    """
    content = io.BytesIO()
    # No date in it: the same results make the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    draw(report).savefig(content, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)
    write_whole(path, content.getvalue())


def draw(report: Report) -> Any:
    """The results of `bench ops` as a Matplotlib figure."""
    from matplotlib.figure import Figure

    results: list[ShapeResult] = [result for result in report.results if result.timed]
    columns = max(1, min(_COLUMNS, len(results)))
    rows = max(1, math.ceil(len(results) / columns))
    width = columns * (_LEFT + _WIDTH + _RIGHT)
    height = rows * (_BOTTOM + _HEIGHT + _TOP) + _TITLE
    figure = Figure(figsize=(width, height))
    figures = {at.threads: at for at in report.figures}
    limits = _limits(results, figures)
    styles = _styles(results)
    for index, result in enumerate(results):
        row, column = divmod(index, columns)
        left = column * (_LEFT + _WIDTH + _RIGHT) + _LEFT
        bottom = (rows - row - 1) * (_BOTTOM + _HEIGHT + _TOP) + _BOTTOM
        axes = figure.add_axes((left / width, bottom / height, _WIDTH / width, _HEIGHT / height))
        _panel(axes, result, figures, limits, styles)
    cpu, torch = report.environment["cpu"]["model"], report.environment["torch"]
    figure.text(
        _LEFT / width,
        1 - 0.22 / height,
        plain(f"{cpu}, torch {torch}"),
        fontsize=_FONT + 1,
        va="center",
        parse_math=False,
    )
    return figure


_Limits = tuple[tuple[float, float], tuple[float, float]]


def _limits(results: Sequence[ShapeResult], figures: dict[int, Figures]) -> _Limits:
    """The range of both axes that holds every point, every ridge and every roof."""
    rows = [row for result in results for row in result.timed]
    across = [row.flops_per_second / row.bytes_per_second for row in rows]
    up = [row.flops_per_second for row in rows]
    for result in results:
        for threads in {row.threads for row in result.timed}:
            at = figures[threads]
            peak = at.peak(result.dtype)
            across.append(peak / at.bytes_per_second)
            up.append(peak)
    return (min(across) / 4, max(across) * 4), (min(up) / 3, max(up) * 3)


def _styles(results: Sequence[ShapeResult]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each candidate, the same in all panels; headwise has the first."""
    names = dict.fromkeys(_base(row.name) for result in results for row in result.timed)
    ordered = sorted(names, key=lambda name: name != "headwise")
    return {name: STYLES[at % len(STYLES)] for at, name in enumerate(ordered)}


def _base(name: str) -> str:
    return name.partition(",")[0]


def _panel(
    axes: Any,
    result: ShapeResult,
    figures: dict[int, Figures],
    limits: _Limits,
    styles: dict[str, tuple[str, str]],
) -> None:
    left, right = limits[0]
    axes.set(xscale="log", yscale="log", xlim=limits[0], ylim=limits[1])
    for threads in sorted({row.threads for row in result.timed}, reverse=True):
        at = figures[threads]
        rate, peak = at.bytes_per_second, at.peak(result.dtype)
        ridge = peak / rate
        style = "-" if threads == result.threads else "--"
        axes.plot([left, ridge, right], [left * rate, peak, peak], style, color="0.35", lw=1.2)
        if threads == result.threads:
            _label_roof(axes, rate, peak, limits)
    for row in result.timed:
        colour, marker = styles[_base(row.name)]
        axes.plot(
            row.flops_per_second / row.bytes_per_second,
            row.flops_per_second,
            marker,
            color=colour,
            markerfacecolor=colour if row.name == _base(row.name) else "white",
            markersize=5.5,
            zorder=3 if _base(row.name) == "headwise" else 2,
        )
    _label_points(axes, result, figures[result.threads], limits)
    axes.set_title(_title(result), fontsize=_FONT, loc="left")
    axes.set_xlabel("FLOP/byte", fontsize=_FONT)
    axes.set_ylabel("FLOP/s", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(result: ShapeResult) -> str:
    """Two lines, broken at a comma."""
    parts = f"{result.description}, {result.dtype}".split(", ")
    half = math.ceil(len(parts) / 2)
    return ", ".join(parts[:half]) + ",\n" + ", ".join(parts[half:])


def _label_roof(axes: Any, rate: float, peak: float, limits: _Limits) -> None:
    (left, right), (bottom, top) = limits
    slope = (_HEIGHT / math.log(top / bottom)) / (_WIDTH / math.log(right / left))
    start = 1.3 * max(left, bottom / rate)
    axes.annotate(
        f"{rate / 1e9:,.1f} GB/s",
        (start, start * rate),
        xytext=(-2, 3),
        textcoords="offset points",
        rotation=math.degrees(math.atan(slope)),
        rotation_mode="anchor",
        fontsize=_FONT - 1,
        color="0.35",
    )
    axes.annotate(
        f"{peak / 1e9:,.0f} GFLOP/s",
        (right, peak),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=_FONT - 1,
        color="0.35",
    )


def _label_points(axes: Any, result: ShapeResult, at: Figures, limits: _Limits) -> None:
    """A name beside each point, under the roof, moved so that no two names overlap."""
    (left, right), (bottom, top) = limits
    points = sorted(result.timed, key=lambda row: row.flops_per_second)
    unit = 72 * _HEIGHT / math.log(top / bottom)
    heights = [unit * math.log(row.flops_per_second / bottom) for row in points]
    across = result.flops / result.bytes
    at_right = math.log(across / left) < 0.5 * math.log(right / left)
    start = across * (1.35 if at_right else 1 / 1.35)
    roof = min(at.peak(result.dtype), at.bytes_per_second * start)
    top = unit * math.log(roof / bottom) - 2
    for row, height in zip(points, spread(heights, 1.25 * _FONT, top)):
        axes.annotate(
            f"{row.name}  {1e3 * row.seconds:.3g} ms",
            (row.flops_per_second / row.bytes_per_second, row.flops_per_second),
            xytext=(start, bottom * math.exp(height / unit)),
            ha="left" if at_right else "right",
            va="center",
            fontsize=_FONT - 1,
            color="0.15",
            fontweight="bold" if _base(row.name) == "headwise" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.6",
                "lw": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0 if at_right else 1, 0.5),
            },
        )
