"""What every figure needs: its file checked and written, colours, foreign text made harmless."""

import importlib.util
import io
import unicodedata
from pathlib import Path
from typing import Any

from headwise.base.written import write_whole
from headwise.errors import OptionError, UnsupportedError

FORMATS = (".png", ".svg")

# Okabe and Ito's colours, which people with any colour vision tell apart; and a marker for each.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)


def check_plot(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be drawn.

    Raises:
        OptionError: neither .png nor .svg.
        UnsupportedError: Matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"plot is {str(path)!r}; expected a name that ends with .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("a plot needs Matplotlib: pip install 'headwise[bench]'")


def plain(text: str) -> str:
    r"""Foreign text as a figure takes it: what is invisible, or not allowed in SVG, as its code.

    Draw it with parse_math=False, or a dollar begins a formula.

    >>> plain("esc\x1b[31m"), plain("a b")
    ('escU+001B[31m', 'a b')
    """
    shown = (
        mark if mark.isprintable() or unicodedata.category(mark) == "Zs" else f"U+{ord(mark):04X}"
        for mark in text
    )
    return "".join(shown)


def write_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a Matplotlib figure as .svg or .png, as `path` ends: atomically.

    The same figure gives the same bytes.

    Raises:
        OptionError: the file cannot be written.
    """
    from matplotlib import rc_context

    content, kind = io.BytesIO(), path.suffix[1:].lower()
    # No date in it, and names that are not random.
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "headwise"}):
        figure.savefig(content, format=kind, dpi=dpi, metadata=metadata)
    write_whole(path, content.getvalue())


def style_axes(axes: Any, font: float) -> None:
    """A grid behind what is drawn, no frame on the right and above, numbers below `font`'s size."""
    axes.tick_params(labelsize=font - 1)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
