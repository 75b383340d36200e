"""What every figure needs: its file checked beforehand, colours, foreign text made harmless."""

import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path

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
        at if at.isprintable() or unicodedata.category(at) == "Zs" else f"U+{ord(at):04X}"
        for at in text
    )
    return "".join(shown)


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights, moved as little as it takes to be `gap` apart within 0 .. `top`.

    >>> spread([10.0, 11.0, 40.0], 6.0, 100.0)
    [7.5, 13.5, 40.0]
    >>> spread([97.0, 98.0, 99.0], 6.0, 100.0)
    [85.0, 91.0, 97.0]
    """
    # Runs of labels that touch, each kept at the mean of what its members want.
    runs: list[list[float]] = []
    for height in heights:
        runs.append([height])
        while len(runs) > 1 and _start(runs[-1], gap, top) < _end(runs[-2], gap, top):
            joined = runs.pop()
            runs[-1] += joined
    return [_start(run, gap, top) + gap / 2 + gap * at for run in runs for at in range(len(run))]


def _start(run: Sequence[float], gap: float, top: float) -> float:
    size = gap * len(run)
    return max(0.0, min(sum(run) / len(run) - size / 2, top - size))


def _end(run: Sequence[float], gap: float, top: float) -> float:
    return _start(run, gap, top) + gap * len(run)
