"""Text and tables for people: foreign text made harmless, tables as text and as HTML."""

import html
import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Text from a model or a file name may hold escape sequences that change the terminal, and
# characters that reorder what is read. C0 controls have pictures at U+2400; newline and tab stay.
_HARMLESS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_HARMLESS |= {0x7F: "\u2421"}
# Surrogates stand for bytes that are no text, which a stream might write as they are.
_HARMLESS |= dict.fromkeys(
    [
        *range(0x80, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
    ],
    "\ufffd",
)
# Columns of a notebook's cell.
_NOTEBOOK = 110


def harmless(text: str) -> str:
    r"""Text in which nothing controls the terminal: control characters become visible ones.

    >>> harmless("\x1b[31mred\x07\n")
    '␛[31mred␇\n'
    """
    return text.translate(_HARMLESS)


def one_line(text: str) -> str:
    """Harmless text on one line."""
    return harmless(" ".join(text.split()))


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "thread"), counted(2, "token")
    ('1 thread', '2 tokens')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def show(*parts: Any, file: TextIO | None = None, width: int | None = None) -> None:
    """Print rich's tables, and `Text` that is not broken into lines; to stdout by default."""
    console = Console(file=file or sys.stdout, highlight=False, width=width)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and what there is to say of each; foreign text is harmless in it."""
    table = Table(show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text("\n".join(map(one_line, text.split("\n")))))
    return table


def as_text(*parts: Any, width: int | None = None) -> str:
    """What `show` prints, without colours; as wide as the terminal."""
    stream = io.StringIO()  # no terminal: nothing but text comes out
    show(*parts, file=stream, width=width)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def as_html(*parts: Any) -> str:
    """The same for a notebook, as preformatted text."""
    text = html.escape(as_text(*parts, width=_NOTEBOOK))
    return f'<pre style="line-height: normal; overflow-x: auto">{text}</pre>'
