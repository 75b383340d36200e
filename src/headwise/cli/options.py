"""Arguments and options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="A model folder, a .gguf file or a hub id. Default: SmolLM2-135M-Instruct.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
