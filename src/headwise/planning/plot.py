"""Cache against context, a line for each mechanism, and where memory runs out."""

import io
import math
from pathlib import Path
from typing import Any

from headwise.errors import OptionError
from headwise.measure.plot import check_plot
from headwise.measure.results import write_whole
from headwise.planning.planner import Plan
from headwise.planning.replanned import MECHANISMS, replanned

# Okabe and Ito's colours, which people with any colour vision tell apart; and a dash pattern for
# each, for print without colours.
_STYLES = {
    "MHA": ("#D55E00", (0, (1, 1))),
    "GQA-8": ("#0072B2", (0, (5, 2))),
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
    """A plan as a Matplotlib figure: GiB of cache against context, both logarithmic.

    Raises:
        OptionError: a model that caches nothing.
    """
    if not plan.alternatives:
        raise OptionError(f"{plan.model.name} caches nothing, so there is nothing to plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    most = max(plan.context, plan.model.spec.max_context or 0, 2 * _LEAST)
    step = (most / _LEAST) ** (1 / (_POINTS - 1))
    contexts = sorted({round(_LEAST * step**at) for at in range(_POINTS)})
    own = next(other.name for other in plan.alternatives if "as it is" in other.name)
    ends = {own: _line(axes, plan, contexts, None, "black", "-", 2.2)}
    for mechanism in MECHANISMS:
        if replanned(plan.model.spec, mechanism) != plan.model.spec:
            ends[mechanism] = _line(axes, plan, contexts, mechanism, *_STYLES[mechanism], 1.5)
    _memory(axes, plan, contexts, ends)
    axes.set(xscale="log", yscale="log", xlim=(contexts[0], contexts[-1] * 3.5))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label(axes, ends, contexts[-1])
    cache = "" if plan.cache.bits is None else f", int{plan.cache.bits}"
    title = f"{plan.model.name}, {plan.dtype}{cache}, batch {plan.batch}"
    axes.set_title(_plain(title), fontsize=_FONT + 1, loc="left")
    axes.set_xlabel("context, tokens", fontsize=_FONT)
    axes.set_ylabel("cache, GiB", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _line(
    axes: Any,
    plan: Plan,
    contexts: list[int],
    mechanism: str | None,
    colour: str,
    dashes: Any,
    width: float,
) -> tuple[float, str]:
    """Draw one line; its last height in GiB, and its colour."""
    spec = plan.model.spec if mechanism is None else replanned(plan.model.spec, mechanism)
    heights = [
        plan.cache.model_bytes(spec, context, plan.batch, plan.encoder_context) / 2**30
        for context in contexts
    ]
    axes.plot(contexts, heights, color=colour, ls=dashes, lw=width, solid_capstyle="round")
    return heights[-1], colour


def _memory(axes: Any, plan: Plan, contexts: list[int], ends: dict[str, tuple[float, str]]) -> None:
    """What the weights leave of the memory, where it is anywhere near."""
    left = (plan.memory - plan.weight_bytes) / 2**30
    if left <= 0:
        text = f"the weights alone exceed {plan.memory / 2**30:,.0f} GiB"
        axes.annotate(text, (0.02, 0.96), xycoords="axes fraction", fontsize=_FONT - 1, va="top")
        return
    if left > 30 * max(height for height, _ in ends.values()):
        return
    axes.axhline(left, color="0.35", lw=1)
    axes.annotate(
        f"{left:,.3g} GiB beside the weights, of {plan.memory / 2**30:,.3g} GiB",
        (contexts[0], left),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=_FONT - 1,
        color="0.25",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        zorder=4,
    )


def _label(axes: Any, ends: dict[str, tuple[float, str]], last: int) -> None:
    """Each line's name at its end, moved so that no two overlap."""
    bottom, top = axes.get_ylim()
    unit = math.log(top / bottom) / 24  # a line of text, of some 24 that the axes have room for
    placed: list[float] = []
    for name, (height, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        at = math.log(height)
        at = max(at, placed[-1] + 1.6 * unit) if placed else at
        placed.append(at)
        axes.annotate(
            name,
            (last, height),
            xytext=(last * 1.12, math.exp(at)),
            fontsize=_FONT,
            color=colour,
            va="center",
            fontweight="bold" if "as it is" in name else "normal",
        )


def _tokens(value: float) -> str:
    """A number of tokens, short.

    >>> _tokens(2048), _tokens(2**20)
    ('2k', '1M')
    """
    if value >= 2**20:
        return f"{value / 2**20:g}M"
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _plain(text: str) -> str:
    """Text without what Matplotlib would read as formulas."""
    return text.replace("$", r"\$")
