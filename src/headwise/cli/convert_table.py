"""What `headwise convert` ends with: what it cost, what it gained, and the conclusion."""

import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from headwise.base.console import one_line
from headwise.conversion.verdict.tables import Rows, made_with, notes, quality_rows, speed_rows
from headwise.conversion.verdict.verdict import Verdict


def show(verdict: Verdict, out: Path) -> None:
    """Print the verdict to stdout; the conclusion is its last line."""
    console = Console(file=sys.stdout, highlight=False)
    console.print(escape(one_line(verdict.title)), style="bold")
    console.print(_table(quality_rows(verdict)))
    if verdict.speeds.contexts:
        console.print()
        console.print(_table(speed_rows(verdict)))
    console.print()
    for line in _lines(verdict, out):
        console.print(Padding(escape(one_line(line)), (0, 0, 0, 2), expand=False))
    console.print(escape(one_line(verdict.conclusion)), soft_wrap=True)


def _table(rows: Rows) -> Table:
    header, *rest = rows
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for cells in rest:
        table.add_row(*map(escape, cells))
    return table


def _lines(verdict: Verdict, out: Path) -> list[str]:
    lines = notes(verdict)
    errors = verdict.layer_errors
    if errors:
        worst = max(range(len(errors)), key=errors.__getitem__)
        lines.append(
            f"squared error of hidden states: {sum(errors) / len(errors):.2g} of theirs in the "
            f"mean of {len(errors)} layers, at most {errors[worst]:.2g} in layer {worst}"
        )
    if verdict.original is not None:
        lines.append(f"continued: {verdict.prompt}")
    for name, quality in verdict.qualities.items():
        lines.append(f"{name}: {quality.continuation}")
    lines += [
        f"method {verdict.method}, {verdict.seconds:,.0f} s, {made_with(verdict)}",
        f"in {out}: the checkpoint; README.md has this verdict and how to load it",
    ]
    return lines
