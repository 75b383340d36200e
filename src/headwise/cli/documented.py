"""Help of a command's options, written where a function's arguments are: in its docstring."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_origin

import typer

_Command = TypeVar("_Command", bound=Callable[..., Any])


def documented(function: _Command) -> _Command:
    """Give each option the help that the docstring's Args have for it.

    What stands before the `*` of the signature is an argument of the command, the rest are options.
    A bool that is off by default has no --no-; what is `Annotated` has its help there.

    >>> @documented
    ... def command(*, steps: int = 5) -> None:
    ...     '''Do it.
    ...
    ...     Args:
    ...         steps: How often
    ...             it is done.
    ...     '''
    >>> command.__doc__, command.__annotations__["steps"].__metadata__[0].help
    ('Do it.', 'How often it is done.')
    """
    function.__doc__, _, section = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    helps: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("     "):
            helps[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            helps[name] = text
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(parameter.annotation) is not Annotated:
            flags = [f"--{name.replace('_', '-')}"] if parameter.default is False else []
            make = typer.Option if parameter.kind is parameter.KEYWORD_ONLY else typer.Argument
            option = make(*flags, help=helps.get(name))  # none under python -OO
            function.__annotations__[name] = Annotated[parameter.annotation, option]
    return function
