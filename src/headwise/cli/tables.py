"""What the tables of the commands have in common: their form, and numbers for people."""

import math
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table

from headwise.base.console import one_line, show


def columns(
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = ("",),
    no_wrap: Collection[str] = (),
) -> Table:
    """A table without frames; columns are to the right but for those in `left`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(
            escape(one_line(name)),
            justify="left" if name in left else "right",
            no_wrap=name in no_wrap,
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def show_table(title: str, table: Table, lines: Iterable[str] = ()) -> None:
    """Print a table to stdout, with its title above and `lines` below."""
    show(heading(title), table, *notes(lines), "")


def heading(title: str) -> Styled:
    """The line above a table."""
    return Styled(escape(one_line(title)), "bold")


def notes(lines: Iterable[str]) -> Iterable[Padding]:
    """The lines below a table, indented."""
    return (Padding(escape(one_line(line)), (0, 0, 0, 2), expand=False) for line in lines)


def lines_of(text: str) -> str:
    """Foreign text for a cell, its lines kept."""
    return "\n".join(escape(one_line(line)) for line in text.split("\n"))


def three_digits(number: float) -> str:
    """A number with three digits, and all those before its point.

    >>> three_digits(12345.6), three_digits(98.76), three_digits(0.01234), three_digits(-0.5)
    ('12,346', '98.8', '0.0123', '-0.500')
    """
    size = abs(number)
    decimals = 2 if not size else max(0, 2 - math.floor(math.log10(size)))
    return f"{number:,.{decimals}f}"
