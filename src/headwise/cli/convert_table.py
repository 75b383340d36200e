"""What `headwise convert` ends with: what it cost, what it gained, and the conclusion."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from headwise.base.console import one_line
from headwise.base.console import show as show_parts
from headwise.cli.tables import columns, heading
from headwise.cli.tables import notes as noted
from headwise.conversion.verdict.tables import Rows, made_with, notes, quality_rows, speed_rows
from headwise.conversion.verdict.verdict import Verdict


def show(verdict: Verdict, out: Path) -> None:
    """Print the verdict to stdout; the conclusion is its last line."""
    speeds = ["", _table(speed_rows(verdict))] if verdict.speeds.contexts else []
    show_parts(
        heading(verdict.title),
        _table(quality_rows(verdict)),
        *speeds,
        "",
        *noted(_lines(verdict, out)),
        Text(one_line(verdict.conclusion)),
    )


def _table(rows: Rows) -> Table:
    header, *rest = rows
    return columns(header, rest, left=header[:1], no_wrap=header[:1])


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
