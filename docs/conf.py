"""Sphinx settings: `make docs` builds the site into docs/_build/html, warnings being errors."""

import os
import re
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

project = "headwise"
author = "the headwise contributors"
copyright = "the headwise contributors"
version = release = installed_version("headwise")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"headwise {release}"

# Docstrings write names in single backticks, as Markdown does.
default_role = "literal"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# Splits a line into code spans and the prose between them.
_CODE_SPAN = re.compile(r"(`+[^`]*`+)")
_PLAIN = {**os.environ, "COLUMNS": "90", "TERM": "dumb", "NO_COLOR": "1"}
_COLON = "\N{MODIFIER LETTER COLON}"


def escape_prose(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]):
    """Keep `|`, `*` and `_` of formulas literal: docstrings are prose, not reST markup."""
    in_example = False
    for index, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            parts = _CODE_SPAN.split(line)
            parts[::2] = [re.sub(r"([|*]|_\b)", r"\\\1", part) for part in parts[::2]]
            lines[index] = "".join(parts)
    if what == "property" and lines:
        # napoleon would take what stands before a colon for the property's type
        lines[0] = lines[0].replace(":", _COLON)


def restore_colon(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]):
    """Undo what `escape_prose` did to a property's first line, once napoleon has seen it."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(_COLON, ":")


def write_commands(app: Any) -> None:
    """Write cli.md, the help of every command as the command prints it."""
    done = subprocess.run(
        [sys.executable, "-m", "headwise"], capture_output=True, check=True, env=_PLAIN, text=True
    )
    names = re.findall(r"^  (\w+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    parts = ["# The command line\n", "What `headwise COMMAND --help` prints.\n"]
    for name in ("", *names, *(f"bench {kind}" for kind in ("machine", "ops", "model"))):
        command = ["headwise", *name.split()]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--help"],
            capture_output=True,
            check=True,
            env=_PLAIN,
            text=True,
        )
        parts.append(f"## {' '.join(command)}\n\n```text\n{done.stdout.rstrip()}\n```\n")
    page, content = Path(app.srcdir) / "cli.md", "\n".join(parts)
    if not page.exists() or page.read_text(encoding="utf-8") != content:
        page.write_text(content, encoding="utf-8")


def setup(app: Any) -> None:
    """Put the docstring filters around napoleon, which runs at priority 500."""
    app.connect("builder-inited", write_commands, priority=1)
    app.connect("autodoc-process-docstring", escape_prose, priority=400)
    app.connect("autodoc-process-docstring", restore_colon, priority=600)
