"""The model card of a converted checkpoint: how to load it, and the verdict."""

import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from headwise.base.console import harmless
from headwise.conversion.verdict.tables import Rows, made_with, notes, quality_rows, speed_rows
from headwise.conversion.verdict.verdict import Verdict

_TEMPLATES = Path(__file__).parent / "assets"


def model_card(verdict: Verdict) -> str:
    """README.md for the checkpoint's folder, in Markdown as Hugging Face reads it.

    Text that came with the model or from its user stands in code spans and fenced blocks, which it
    cannot leave.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    # a JSON string is YAML
    environment.filters |= {"yaml": json.dumps, "table": _table, "code": _code, "block": _block}
    return environment.get_template("card.md.jinja").render(
        verdict=verdict,
        quality_rows=quality_rows(verdict),
        speed_rows=speed_rows(verdict),
        notes=notes(verdict),
        made_with=made_with(verdict),
    )


def _table(rows: Rows) -> str:
    """Rows of our own text, the first of them the header."""
    header, *rest = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rest])


def _code(text: str) -> str:
    """Foreign text as a code span: between more backticks than it holds together."""
    shown = " ".join(harmless(text).split())
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _block(text: str) -> str:
    """Foreign text as a fenced block, of a fence that is longer than any in it."""
    shown = harmless(text)
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _longest_run(text: str) -> int:
    """How many backticks follow one another at most."""
    return max(map(len, re.findall("`+", text)), default=0)
