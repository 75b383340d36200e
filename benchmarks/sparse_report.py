"""The table and the picture of sparse.py's results."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from headwise.base.figure import style_axes, write_figure
from headwise.base.plot import style

Row = dict[str, Any]
DRAWS = 2000


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def interval(values: list[float]) -> tuple[float, float]:
    """95% of the means of as many values drawn again."""
    draw = random.Random(0)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return means[DRAWS // 40], means[-DRAWS // 40 - 1]


def ordered(rows: list[Row], key: str) -> list[Any]:
    """The values of a key, as they first come."""
    return list(dict.fromkeys(row[key] for row in rows))


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def cell(rows: list[Row], key: str, shown: Callable[[float], str]) -> str:
    """A mean with its interval, and of how many."""
    values = [row[key] for row in rows]
    if not values:
        return ""
    low, high = interval(values)
    return f"{shown(mean(values))} ({shown(low)}-{shown(high)}) of {len(values)}"


def print_report(rows: list[Row]) -> None:
    """Scores, distances and perplexities; then distances beside exact top-k's."""
    console = Console(width=240)
    for length in sorted(set(ordered(rows, "length"))):
        here = of(rows, length=length)
        tasks = [task for task in ordered(here, "task") if task != "code"]
        table = Table(
            *("", *tasks, "KL", "perplexity of code", "its KL", "hours"),
            title=f"{length:,} tokens: mean (95%) of how many",
            box=box.MARKDOWN,
        )
        for method in ordered(here, "method"):
            mine = of(here, method=method)
            asked = [row for row in mine if row["task"] != "code"]
            code = of(mine, task="code")
            table.add_row(
                method,
                *(cell(of(asked, task=task), "score", "{:.0%}".format) for task in tasks),
                cell(asked, "kl", "{:.4f}".format),
                *(f"{math.exp(row['nats']):.4f}" for row in code),
                *(f"{row['kl']:.4f}" for row in code),
                *([""] * (2 - 2 * len(code))),
                f"{sum(row['seconds'] for row in mine) / 3600:.2f}",
            )
        console.print(table)
    print_ratios(rows)


def print_ratios(rows: list[Row]) -> None:
    """Mean KL of every method, times exact top-k's, on the questions that both have answered."""
    for method in ordered(rows, "method"):
        name, _, most = method.partition(":")
        if name in ("dense", "exact"):
            continue
        for kind, wanted in (("questions", False), ("code", True)):
            sides = [
                {row["id"].partition(" ")[2]: row["kl"] for row in of(rows, method=each)
                 if (row["task"] == "code") == wanted}
                for each in (method, f"exact:{most}")
            ]  # fmt: skip
            both = sides[0].keys() & sides[1].keys()
            if both:
                ours, exact = (mean([side[key] for key in both]) for side in sides)
                print(f"{method}, {kind}: KL {ours:.4f}, {ours / exact:.2f}x exact top-k's")


def draw(rows: list[Row], file: Path) -> None:
    """The mean score of all tasks, and the mean KL, over the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = [row for row in rows if row["task"] != "code"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for index, method in enumerate(ordered(asked, "method")):
        colour, marker = style(index)
        lengths = sorted(set(ordered(of(asked, method=method), "length")))
        for axes, key in ((left, "score"), (right, "kl")):
            each = [[row[key] for row in of(asked, method=method, length=at)] for at in lengths]
            ends = [interval(values) for values in each]
            if key == "score" or not method.startswith("dense"):
                axes.plot(lengths, list(map(mean, each)), color=colour, marker=marker, label=method)
                axes.fill_between(lengths, *zip(*ends), color=colour, alpha=0.12, linewidth=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(ordered(asked, "length"))))
        axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
        axes.minorticks_off()
    left.set_ylim(0, 1)
    left.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    right.set_yscale("log")
    style_axes(left, 10, title="Score of all tasks", across="tokens", up="")
    style_axes(right, 10, title="KL(dense || method)", across="tokens", up="nats")
    left.legend(fontsize=9)
    write_figure(figure, file)
    pyplot.close(figure)
