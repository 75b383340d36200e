"""The figure: quality against cache bytes of a sequence, and decode speed against the context."""

import math
from typing import Any

from headwise.base.figure import style_axes
from headwise.base.plot import style
from headwise.comparison.results import Comparison

_FONT = 8.0
_WIDTH, _HEIGHT = 7.2, 3.1
# Two points closer than this are named on either side of them.
_NEAR = 1.5
_QUALITY = {"accuracy": "accuracy of recall", "loss": "loss on held-out text, nats per byte"}
_BASELINE = {"accuracy": "any value of the sequence", "loss": "by frequency of bytes"}


def draw(comparison: Comparison) -> Any:
    """A comparison whose speed is measured, as a Matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_quality(left, comparison)
    _draw_decoding(right, comparison)
    return figure


def _draw_quality(axes: Any, comparison: Comparison) -> None:
    """One point per mechanism: the mean over seeds, a line from the worst to the best of them."""
    names = comparison.configuration.mechanisms
    sizes = {name: comparison.configuration.sequence_bytes(name) for name in names}
    for quality in comparison.qualities():
        colour, marker = style(names.index(quality.mechanism))
        size, values = sizes[quality.mechanism], quality.values
        axes.plot([size, size], [min(values), max(values)], color=colour, lw=1.4)
        axes.plot([size] * len(values), values, "_", color=colour, ms=9, mew=1.4)
        axes.plot(size, quality.mean, marker, color=colour, ms=6.5, zorder=3)
        at_left = any(size < other < _NEAR * size for other in sizes.values())
        axes.annotate(
            quality.mechanism,
            (size, quality.mean),
            xytext=(-8 if at_left else 8, 0),
            textcoords="offset points",
            ha="right" if at_left else "left",
            va="center",
            fontsize=_FONT - 1,
        )
    axes.axhline(comparison.baseline, color="0.45", lw=1, ls="--")
    axes.annotate(
        _BASELINE[comparison.metric],
        (1, comparison.baseline),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=_FONT - 1,
        color="0.35",
    )
    low, high = (math.log2(bound(sizes.values())) for bound in (min, max))
    ticks = [2**power for power in range(math.floor(low), math.ceil(high) + 1)]
    axes.set(xscale="log", xlim=(2 ** (low - 0.8), 2 ** (high + 0.8)))
    axes.set_xticks([tick for tick in ticks if low - 0.8 <= math.log2(tick) <= high + 0.8])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    if comparison.metric == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    seeds = comparison.configuration.seeds
    title = "one seed" if seeds == 1 else f"mean of {seeds} seeds, and each"
    tokens = comparison.configuration.tokens
    across = f"cache bytes of {tokens:,} tokens, all layers, float32"
    style_axes(axes, _FONT, title=title, across=across, up=_QUALITY[comparison.metric])


def _draw_decoding(axes: Any, comparison: Comparison) -> None:
    names = comparison.configuration.mechanisms
    for speed in comparison.speeds:
        colour, marker = style(names.index(speed.mechanism))
        contexts = [each.context for each in speed.decode]
        rates = [each.rate.tokens_per_second for each in speed.decode]
        axes.plot(contexts, rates, marker=marker, color=colour, ms=5, lw=1.2, label=speed.mechanism)
        for each in speed.decode:
            axes.plot([each.context] * 2, [each.rate.low, each.rate.high], color=colour, lw=1)
    axes.set(xscale="log", ylim=(0, None))
    axes.set_xticks([each.context for each in comparison.speeds[0].decode])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    title, up = "median, and quartiles", "decoded tokens/s, one sequence"
    style_axes(axes, _FONT, title=title, across="tokens in the cache", up=up)
    axes.legend(fontsize=_FONT - 1, frameon=False, loc="lower left")
