"""The figure: quality against cache bytes a token, and decode speed against the context."""

import io
import math
from pathlib import Path
from typing import Any

from headwise.base.plot import STYLES
from headwise.base.written import write_whole
from headwise.comparison.results import Comparison

_FONT = 8.0
_WIDTH, _HEIGHT = 7.2, 3.1
# Two points closer than this are named on either side of them.
_NEAR = 1.5
_QUALITY = {"accuracy": "accuracy of recall", "loss": "loss on held-out text, nats a byte"}
_BASELINE = {"accuracy": "any value of the sequence", "loss": "by frequency of bytes"}


def write_figure(found: Comparison, path: Path) -> None:
    """Draw a comparison as .svg or .png, whole or not at all.

    Raises:
        OptionError: the file cannot be written.
    """
    from matplotlib import rc_context

    content, kind = io.BytesIO(), path.suffix[1:].lower()
    # No date and no random names in it: the same results make the same file.
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "headwise"}):
        draw(found).savefig(content, format=kind, dpi=150, metadata=metadata)
    write_whole(path, content.getvalue())


def draw(found: Comparison) -> Any:
    """A comparison whose speed is measured, as a Matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_quality(left, found)
    _draw_decoding(right, found)
    for axes in (left, right):
        axes.tick_params(labelsize=_FONT - 1)
        axes.grid(color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_quality(axes: Any, found: Comparison) -> None:
    """A point a mechanism: the mean over seeds, a line from the worst to the best of them."""
    sizes = {speed.mechanism: speed.cache_bytes_per_token for speed in found.speeds}
    for at in found.qualities():
        colour, marker = _style(found, at.mechanism)
        size = sizes[at.mechanism]
        axes.plot([size, size], [min(at.values), max(at.values)], color=colour, lw=1.4)
        axes.plot([size] * len(at.values), at.values, "_", color=colour, ms=9, mew=1.4)
        axes.plot(size, at.mean, marker, color=colour, ms=6.5, zorder=3)
        at_left = any(size < other < _NEAR * size for other in sizes.values())
        axes.annotate(
            at.mechanism,
            (size, at.mean),
            xytext=(-8 if at_left else 8, 0),
            textcoords="offset points",
            ha="right" if at_left else "left",
            va="center",
            fontsize=_FONT - 1,
        )
    axes.axhline(found.baseline, color="0.45", lw=1, ls="--")
    axes.annotate(
        _BASELINE[found.metric],
        (1, found.baseline),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=_FONT - 1,
        color="0.35",
    )
    low, high = (math.log2(bound(sizes.values())) for bound in (min, max))
    ticks = [2**at for at in range(math.floor(low), math.ceil(high) + 1)]
    axes.set(xscale="log", xlim=(2 ** (low - 0.8), 2 ** (high + 0.8)))
    axes.set_xticks([tick for tick in ticks if low - 0.8 <= math.log2(tick) <= high + 0.8])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    if found.metric == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    seeds = found.configuration.seeds
    axes.set_xlabel("cache bytes a token, all layers, float32", fontsize=_FONT)
    axes.set_ylabel(_QUALITY[found.metric], fontsize=_FONT)
    title = "one seed" if seeds == 1 else f"mean of {seeds} seeds, and each"
    axes.set_title(title, fontsize=_FONT, loc="left")


def _draw_decoding(axes: Any, found: Comparison) -> None:
    for speed in found.speeds:
        colour, marker = _style(found, speed.mechanism)
        contexts = [at.context for at in speed.decode]
        rates = [at.rate.tokens_per_second for at in speed.decode]
        axes.plot(contexts, rates, marker=marker, color=colour, ms=5, lw=1.2, label=speed.mechanism)
        for at in speed.decode:
            axes.plot([at.context] * 2, [at.rate.low, at.rate.high], color=colour, lw=1)
    axes.set(xscale="log", ylim=(0, None))
    axes.set_xticks([at.context for at in found.speeds[0].decode])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens in the cache", fontsize=_FONT)
    axes.set_ylabel("decoded tokens/s, one sequence", fontsize=_FONT)
    axes.set_title("median, and quartiles", fontsize=_FONT, loc="left")
    axes.legend(fontsize=_FONT - 1, frameon=False, loc="lower left")


def _style(found: Comparison, mechanism: str) -> tuple[str, str]:
    at = found.configuration.mechanisms.index(mechanism)
    return STYLES[at % len(STYLES)]
