"""The commands and the options that stand before them."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from headwise.cli.bench import bench
from headwise.cli.compare import compare
from headwise.cli.convert import convert
from headwise.cli.env import env
from headwise.cli.generate import generate
from headwise.cli.plan import plan
from headwise.cli.remember import forget, remember
from headwise.cli.view import view


def summary(function: Callable[..., Any]) -> str:
    """The first line of a command's description, which the list of commands shows whole."""
    return (function.__doc__ or "").partition("\n")[0]


def command() -> Any:
    """The command line as one callable of Click's kind."""
    app = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_before)
    functions: tuple[Callable[..., Any], ...] = (
        *(generate, remember, forget, plan, compare, convert, view, env),
    )
    for function in functions:
        app.command(short_help=summary(function))(function)
    app.add_typer(bench)
    return typer.main.get_command(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"headwise {version('headwise')}")
        raise typer.Exit


def _before(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Decoder attention (MHA, MQA, GQA, MLA) for Hugging Face Transformers models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
