"""Arguments and options that several commands have, and what they amount to."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from headwise.errors import OptionError

_Value = TypeVar("_Value")

Weights = Literal["auto", "packed", "float"]

Model = Annotated[
    str | None,
    typer.Argument(
        help="A model folder, a .gguf file, a hub id, smollm2 or minilm. Default: smollm2, "
        "SmolLM2-135M-Instruct.",
    ),
]
Named = Annotated[str | None, typer.Option("--model", help="The same as MODEL.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of weights and cache: float32, bfloat16, float16 (or fp32, bf16, fp16); auto keeps "
        "the checkpoint's."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto finds one.")]
# Before it was --document it was --context, which elsewhere is a number of tokens.
OldDocument = Annotated[Path | None, typer.Option("--context", hidden=True)]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text and tables.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


def the_model(model: str | None, named: str | None) -> str | None:
    """What MODEL or --model says.

    Raises:
        OptionError: both are given.
    """
    return _either(model, named, f"model is {model!r} and --model {named!r}")


def the_document(
    document: Path | None, old: Path | None, *, old_name: str = "--context"
) -> Path | None:
    """What --document says, or its old name.

    Raises:
        OptionError: both are given.
    """
    return _either(document, old, f"--document and {old_name} are the same")


def _either(one: _Value | None, other: _Value | None, both: str) -> _Value | None:
    if one is not None and other is not None:
        raise OptionError(f"{both}; give one of them")
    return one if other is None else other


def weights_of(asked: Weights, model: str | None, device: str, *, alone: bool) -> Weights:
    """What becomes of a .gguf file's weights; stock, and what is compared with it, get numbers.

    alone: whether headwise alone runs.
    """
    from headwise.loading.options import find_device
    from headwise.loading.source import demo_model, find_source

    if asked != "auto":
        return asked
    source = find_source(demo_model() if model is None else model)
    on_cpu = find_device(device).type == "cpu"
    return "packed" if source.kind == "gguf" and alone and on_cpu else "float"


def words(text: str | None) -> list[str]:
    """The parts of an option that is joined by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def print_json(fields: Any) -> None:
    """Print plain data as one JSON object; what is no number there becomes null."""
    from headwise.base.written import as_json

    sys.stdout.write(as_json(fields) + "\n")
