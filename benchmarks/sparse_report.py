"""The table and the picture of sparse.py's results.

Intervals are of 95%: Wilson's for scores, whose fractions vary less than the yes and no that it is
for, and of means drawn again for distances and differences. A task counts, in differences and in
the picture, at the lengths at which the dense model has 60% or more.
"""

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
DRAWS, LEAST = 2000, 0.6


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def wilson(values: list[float]) -> tuple[float, float]:
    """The interval of a share, of values between 0 and 1."""
    count, share, z = len(values), mean(values), 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half /= 1 + z * z / count
    return middle - half, middle + half


def drawn_again(values: list[float]) -> tuple[float, float]:
    """The interval of a mean, from means of as many values drawn again."""
    draw = random.Random(0)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return means[DRAWS // 40], means[-DRAWS // 40 - 1]


INTERVALS = {"score": wilson, "kl": drawn_again}


def ordered(rows: list[Row], key: str) -> list[Any]:
    """The values of a key, as they first come."""
    return list(dict.fromkeys(row[key] for row in rows))


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def counted(rows: list[Row]) -> list[Row]:
    """The questions of tasks that the dense model can do at their length."""
    scores = dict[tuple[int, str], list[float]]()
    for row in of(rows, method="dense"):
        if row["task"] != "code":
            scores.setdefault((row["length"], row["task"]), []).append(row["score"])
    able = {place for place, values in scores.items() if mean(values) >= LEAST}
    return [row for row in rows if (row["length"], row["task"]) in able]


def cell(rows: list[Row], key: str, shown: Callable[[float], str]) -> str:
    """A mean with its interval, and of how many."""
    values = [row[key] for row in rows]
    if not values:
        return ""
    low, high = INTERVALS[key](values)
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
    for method in ordered(rows, "method")[1:]:
        print_beside(rows, method)


def paired(rows: list[Row], key: str, one: str, other: str) -> tuple[list[float], list[float]]:
    """What two methods have on the places that both have seen."""
    sides = [
        {row["id"].partition(" ")[2]: row[key] for row in of(rows, method=method)}
        for method in (one, other)
    ]
    both = [place for place in sides[0] if place in sides[1]]
    return [sides[0][place] for place in both], [sides[1][place] for place in both]


def print_beside(rows: list[Row], method: str) -> None:
    """A method's scores beside dense, and its distances beside exact top-k's."""
    ours, dense = paired(counted(rows), "score", method, "dense")
    if ours:
        apart = [a - b for a, b in zip(ours, dense)]
        low, high = drawn_again(apart)
        print(
            f"{method}: {mean(ours):.1%} of {len(ours)} questions where dense has "
            f"{mean(dense):.1%}: {mean(apart):+.1%} ({low:+.1%} to {high:+.1%})"
        )
    exact = f"exact:{method.partition(':')[2]}"
    for kind, group in (
        ("questions", [row for row in rows if row["task"] != "code"]),
        ("code", of(rows, task="code")),
    ):
        ours, best = paired(group, "kl", method, exact)
        if ours and method != exact:
            ratio = mean(ours) / mean(best)
            print(f"{method}, {kind}: KL {mean(ours):.4f}, {ratio:.2f}x exact top-k's")


def draw(rows: list[Row], file: Path) -> None:
    """The mean score of all tasks, and the mean KL, where a method has all questions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = counted(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for index, method in enumerate(ordered(asked, "method")):
        colour, marker = style(index)
        lengths = [
            length
            for length in sorted(set(ordered(of(asked, method=method), "length")))
            if len(of(asked, method=method, length=length))
            == len(of(asked, method="dense", length=length))
        ]
        for axes, key in ((left, "score"), (right, "kl")) if lengths else ():
            each = [[row[key] for row in of(asked, method=method, length=at)] for at in lengths]
            ends = [INTERVALS[key](values) for values in each]
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
