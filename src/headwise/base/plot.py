"""What every figure needs: its file checked beforehand, colours, foreign text made harmless."""

import importlib.util
import unicodedata
from pathlib import Path

from headwise.base.written import check_writable
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


def style(index: int) -> tuple[str, str]:
    """A colour and a marker, which differ between any two of the first 49.

    >>> style(0), style(7)
    (('#0072B2', 'o'), ('#0072B2', 's'))
    """
    # with more lines than colours, a colour comes back with another marker
    return STYLES[index % len(STYLES)][0], STYLES[(index + index // len(STYLES)) % len(STYLES)][1]


def check_plot(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be drawn.

    Raises:
        OptionError: neither .png nor .svg, or a folder that does not exist or cannot be written.
        UnsupportedError: Matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"plot is {str(path)!r}; expected a name that ends with .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("a plot needs Matplotlib: pip install 'headwise[bench]'")
    check_writable(path)


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
