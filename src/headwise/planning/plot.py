"""Cache against context, a line for each mechanism, and where memory runs out."""

import math
from pathlib import Path
from typing import Any

from headwise.base.figure import style_axes, write_figure
from headwise.base.memory import gib
from headwise.base.plot import check_plot, plain
from headwise.errors import OptionError
from headwise.planning.planner import Plan

# Okabe and Ito's colours, which people with any colour vision tell apart; and a dash pattern for
# each, for print without colours.
_STYLES: dict[str, tuple[str, Any]] = {
    "mha": ("#D55E00", (0, (1, 1))),
    "gqa": ("#0072B2", (0, (5, 2))),
    "mqa": ("#009E73", (0, (3, 1, 1, 1))),
    "mla": ("#CC79A7", (0, (7, 2, 1, 2))),
}
_LEAST = 512
_POINTS = 65
_FONT = 9.0
_BYTES = (" bytes", " KiB", " MiB", " GiB", " TiB")


def write_plot(plan: Plan, path: Path) -> None:
    """Draw a plan as .png or .svg, atomically.

    Raises:
        OptionError: another kind of file, one that cannot be written, or a model without a cache.
        UnsupportedError: Matplotlib is not installed.
    """
    check_plot(path)
    write_figure(draw(plan), path)


def draw(plan: Plan) -> Any:
    """A plan as a Matplotlib figure: cache against context, both logarithmic.

    Raises:
        OptionError: a model that caches nothing.
    """
    if not plan.alternatives:
        raise OptionError(f"{plan.model.name} caches nothing, so there is nothing to plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    most = max(plan.context, plan.model.spec.max_context or 0, 4 * _LEAST)
    step = (most / _LEAST) ** (1 / (_POINTS - 1))
    contexts = sorted({round(_LEAST * step**power) for power in range(_POINTS)})
    highest = _draw_lines(axes, plan, contexts)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(contexts[0], contexts[-1])
    _draw_memory(axes, plan, contexts[0], highest)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value, "", "k", "M"))
    axes.yaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.yaxis.set_major_formatter(lambda value, _: _short(value, *_BYTES))
    axes.yaxis.set_minor_formatter(NullFormatter())
    cache = plan.cache.integers and f", {plan.cache.integers}"
    encoder = f", {plan.encoder_context:,} tokens in the encoder" if plan.encoder_context else ""
    title = f"{plan.model.name}, {plan.dtype}{cache}, batch {plan.batch}{encoder}"
    axes.set_title(plain(title), fontsize=_FONT + 1, loc="left", parse_math=False)
    axes.set_xlabel("context, tokens", fontsize=_FONT)
    axes.set_ylabel("cache", fontsize=_FONT)
    style_axes(axes, _FONT)
    return figure


def _draw_lines(axes: Any, plan: Plan, contexts: list[int]) -> int:
    """A line for each alternative, named from the largest cache to the smallest, which it gives."""
    sizes = {
        other: [
            plan.cache.model_bytes(other.spec, context, plan.batch, plan.encoder_context)
            for context in contexts
        ]
        for other in plan.alternatives
    }
    for other, heights in sorted(sizes.items(), key=lambda item: -item[1][-1]):
        colour, dashes = ("black", "-") if other.as_it_is else _STYLES[other.kind]
        width, above = (2.2, 3) if other.as_it_is else (1.5, 2)
        axes.plot(
            contexts, heights, color=colour, ls=dashes, lw=width, zorder=above, label=other.name
        )
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=_FONT,
        handlelength=3.2,
        labelcolor="linecolor",
    )
    return max(heights[-1] for heights in sizes.values())


def _draw_memory(axes: Any, plan: Plan, first: int, highest: float) -> None:
    """What the weights leave of the memory, where it is anywhere near."""
    left = plan.memory - plan.weight_bytes
    if left <= 0:
        text = f"the weights alone take more than {gib(plan.memory)}"
        axes.annotate(text, (0.02, 0.96), xycoords="axes fraction", fontsize=_FONT - 1, va="top")
        return
    if left > 30 * highest:
        return
    axes.axhline(left, color="0.35", lw=1)
    axes.set_ylim(top=max(axes.get_ylim()[1], 2 * left))
    axes.annotate(
        f"{gib(left)} beside the weights, of {gib(plan.memory)}",
        (first, left),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=_FONT - 1,
        color="0.25",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        zorder=4,
    )


def _short(value: float, *units: str) -> str:
    """A number in the largest of its units, each of which is 1024 of the one before.

    >>> _short(2**20, "", "k", "M"), _short(2**32, *_BYTES)
    ('1M', '4 GiB')
    """
    power = max(0, min(math.frexp(value)[1] - 1, 10 * len(units) - 1)) // 10
    return f"{value / 1024**power:g}{units[power]}"
