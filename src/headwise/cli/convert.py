"""`headwise convert`: a checkpoint moved to a cheaper attention, and what that cost."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwise.cli.options import Model
from headwise.cli.terminal import screen


def convert(
    model: Model = None,
    *,
    named: Annotated[
        str | None, typer.Option("--model", help="The same as MODEL.", show_default=False)
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="gqa:2 (2 kv heads), mqa, mla (everything kept), mla:50% (of the cache), "
            "mla:rank=128,rope=48, or mha (from MLA)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder: new, or empty.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A text file like what the model is for. Needed unless everything is kept "
            "(mla, mha), where it is what quality is measured on.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Literal["aware", "naive"],
        typer.Option(help="Aware of the activations, or the plain baseline to compare with."),
    ] = "aware",
    tokens: Annotated[int, typer.Option(help="Of the text, to calibrate with.")] = 16384,
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    tune: Annotated[
        int, typer.Option(help="Steps of distillation from the original, afterwards.")
    ] = 0,
) -> int:
    """Move a checkpoint to a cheaper attention, and say what that cost."""
    from headwise import conversion
    from headwise.cli.convert_table import show
    from headwise.errors import OptionError
    from headwise.loading.progress import quiet_transformers
    from headwise.loading.source import demo_model

    if model is not None and named is not None:
        raise OptionError(f"model is {model!r} and --model {named!r}; give one of them")
    chosen = model if named is None else named
    options: dict[str, Any] = {
        "calibration": calibration,
        "out": out,
        "method": method,
        "tokens": tokens,
        "length": length,
        "tune": tune,
    }
    try:
        with quiet_transformers(), screen(animated=False) as shown:
            verdict = conversion.convert(
                demo_model() if chosen is None else chosen,
                to,
                command=_command(chosen, to, options),
                progress=shown,
                **options,
            )
    except KeyboardInterrupt:
        again = "goes on from what is kept" if tune else "starts anew"
        typer.echo(f"headwise: interrupted; the same command {again}", err=True)
        return 130
    show(verdict, out)
    return 0


def _command(model: str | None, to: str, options: dict[str, Any]) -> str:
    """The command line that repeats this run."""
    words = ["headwise", "convert", *([] if model is None else [model]), "--to", to]
    for option, value in options.items():
        if value is not None:
            words += [f"--{option}", str(value)]
    return shlex.join(words)
