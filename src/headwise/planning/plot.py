"""Cache against context, a line for each mechanism, and where memory runs out."""

import io
import math
from pathlib import Path
from typing import Any

from headwise.base.memory import gib
from headwise.base.plot import check_plot, plain, spread
from headwise.base.written import write_whole
from headwise.errors import OptionError
from headwise.planning.planner import Plan

# Okabe and Ito's colours, which people with any colour vision tell apart; and a dash pattern for
# each, for print without colours.
_STYLES = {
    "MHA": ("#D55E00", (0, (1, 1))),
    "GQA": ("#0072B2", (0, (5, 2))),
    "MQA": ("#009E73", (0, (3, 1, 1, 1))),
    "MLA": ("#CC79A7", (0, (7, 2, 1, 2))),
}
_LEAST = 512
_POINTS = 65
_FONT = 9.0


def write_plot(plan: Plan, path: Path) -> None:
    """Draw a plan as .png or .svg, whole or not at all.

    Raises:
        OptionError: another kind of file, one that cannot be written, or a model without a cache.
        UnsupportedError: Matplotlib is not installed.
    """
    check_plot(path)
    figure = draw(plan)
    from matplotlib import rc_context

    content = io.BytesIO()
    # No date in it, and names that are not random: the same plan makes the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    with rc_context({"svg.hashsalt": "headwise"}):
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)
    write_whole(path, content.getvalue())


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
    contexts = sorted({round(_LEAST * step**at) for at in range(_POINTS)})
    ends: dict[str, tuple[float, str]] = {}
    for other in plan.alternatives:
        own = "as it is" in other.name
        kind = other.name.split("-", maxsplit=1)[0].split(" ", maxsplit=1)[0]
        colour, dashes = ("black", "-") if own else _STYLES[kind]
        heights = [
            plan.cache.model_bytes(other.spec, context, plan.batch, plan.encoder_context)
            for context in contexts
        ]
        width = 2.2 if own else 1.5
        axes.plot(contexts, heights, color=colour, ls=dashes, lw=width, zorder=3 if own else 2)
        ends[other.name] = heights[-1], colour
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(contexts[0], contexts[-1])
    _memory(axes, plan, contexts[0], max(height for height, _ in ends.values()))
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.yaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.yaxis.set_major_formatter(lambda value, _: _bytes(value))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _label(axes, ends)
    cache = "" if plan.cache.bits is None else f", int{plan.cache.bits}"
    encoder = f", {plan.encoder_context:,} tokens in the encoder" if plan.encoder_context else ""
    title = f"{plan.model.name}, {plan.dtype}{cache}, batch {plan.batch}{encoder}"
    axes.set_title(plain(title), fontsize=_FONT + 1, loc="left", parse_math=False)
    axes.set_xlabel("context, tokens", fontsize=_FONT)
    axes.set_ylabel("cache", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _memory(axes: Any, plan: Plan, first: int, highest: float) -> None:
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


def _label(axes: Any, ends: dict[str, tuple[float, str]]) -> None:
    """Each line's name beside its end, moved so that no two overlap."""
    bottom, top = axes.get_ylim()
    ordered = sorted(ends.items(), key=lambda item: item[1][0])
    heights = [math.log(height / bottom) / math.log(top / bottom) for _, (height, _) in ordered]
    for (name, (_, colour)), at in zip(ordered, spread(heights, 0.055, 1.0)):
        axes.annotate(
            name,
            (1.015, at),
            xycoords="axes fraction",
            fontsize=_FONT,
            color=colour,
            va="center",
            fontweight="bold" if "as it is" in name else "normal",
        )


def _bytes(value: float) -> str:
    """A size, short.

    >>> _bytes(2**32), _bytes(2**26)
    ('4 GiB', '64 MiB')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:g} {unit}"
    return f"{value:g}"


def _tokens(value: float) -> str:
    """A number of tokens, short.

    >>> _tokens(2048), _tokens(2**20)
    ('2k', '1M')
    """
    if value >= 2**20:
        return f"{value / 2**20:g}M"
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
