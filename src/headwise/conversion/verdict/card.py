"""The model card of a converted checkpoint: how to load it, and the verdict."""

import json
import re
import unicodedata
from collections.abc import Iterator

from headwise.conversion.verdict.tables import Rows, made_with, notes, quality_rows, speed_rows
from headwise.conversion.verdict.verdict import Verdict

# Classes of characters that change the order in which a line is read.
_ORDER_CHANGING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

_STOCK = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

With headwise's attention and cache:

```python
import headwise

headwise.attach(model)
```"""

_OURS = """\
Its architecture comes with headwise (`pip install 'headwise[hf]'`), without remote code:

```python
import headwise

folder = "."  # this folder
model, tokenizer = headwise.load(folder)
headwise.attach(model)  # its attention and cache
```

Or by Transformers' own classes:

```python
import headwise.hf  # makes the architecture known
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
```"""


def model_card(verdict: Verdict) -> str:
    """README.md for the checkpoint's folder, in Markdown as Hugging Face reads it.

    Text that came with the model or from its user stands in code spans and fenced blocks, which it
    cannot leave.
    """
    parts = [
        _front_matter(verdict),
        f"# {_code(verdict.model)} converted to {verdict.target}",
        f"**{verdict.conclusion}.**",
        "The original's card says what the model is for and under which licence; this one says "
        "what became of it.",
        "## Load",
        *_loading(verdict),
        "## Verdict",
        *_verdict(verdict),
        "## How it was made",
        f"Method {verdict.method}, {verdict.seconds:,.0f} seconds, by",
        _block(verdict.command),
        f"with {_code(made_with(verdict))}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(verdict: Verdict) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if verdict.base_model is not None:
        lines.append(f"base_model: {json.dumps(verdict.base_model)}")  # a JSON string is YAML
    lines += ["tags:", "- headwise", "- kv-cache", f"- {verdict.target.partition(':')[0]}"]
    return "\n".join(["---", *lines, "---"])


def _loading(verdict: Verdict) -> Iterator[str]:
    if verdict.model_type.startswith("headwise"):
        yield _OURS
    else:
        yield f"An ordinary Transformers checkpoint, of model_type {_code(verdict.model_type)}:"
        yield _STOCK


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield _table(quality_rows(verdict))
    if verdict.speeds.contexts:
        yield _table(speed_rows(verdict))
    yield "\n".join(f"- {note}" for note in notes(verdict))
    if verdict.layer_errors:
        yield (
            "Squared error of the hidden states after each layer's attention, as a share of their "
            "square, on text that was not fitted:"
        )
        rows = [[str(layer), f"{error:.2g}"] for layer, error in enumerate(verdict.layer_errors)]
        yield _table([["layer", "error"], *rows])
    models = {
        "original": verdict.original,
        "converted": verdict.converted,
        "tuned": verdict.tuned,
    }
    if verdict.original is not None:
        yield "A held-out beginning:"
        yield _block(verdict.prompt)
    for name, quality in models.items():
        if quality is not None:
            yield f"continued greedily, {name}:"
            yield _block(quality.continuation)


def _table(rows: Rows) -> str:
    """Rows of our own text, the first of them the header."""
    header, *rest = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rest])


def _code(text: str) -> str:
    """Foreign text as a code span: between more backticks than it holds together."""
    shown = " ".join(_plain(text).split())
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _block(text: str) -> str:
    """Foreign text as a fenced block, of a fence that is longer than any in it."""
    shown = _plain(text)
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _longest_run(text: str) -> int:
    """How many backticks follow one another at most."""
    return max(map(len, re.findall("`+", text)), default=0)


def _plain(text: str) -> str:
    """Text without characters that control what shows it, or change the order it is read in."""
    return "".join(
        "\ufffd"
        if (unicodedata.category(at) in ("Cc", "Cs") and at not in "\n\t")
        or unicodedata.bidirectional(at) in _ORDER_CHANGING
        else at
        for at in text
    )
