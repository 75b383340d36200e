"""The `headwise` command: a thin shell over the library's functions.

Every error that a user can cause is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from headwise.errors import HeadwiseError

__all__ = ["main"]

_LONGEST = 1000
# Of the disk that our output goes to (`headwise env > file`).
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own by default); returns its exit code."""
    from headwise.cli.app import command

    return guarded(
        lambda: command()(arguments, prog_name="headwise", standalone_mode=False), arguments
    )


def guarded(run: Callable[[], Any], arguments: list[str] | None = None) -> int:
    """What a command returns, or the exit code of its error, of which one line is said."""
    import typer

    from headwise.base.console import one_line
    from headwise.cli.terminal import interrupted, show_any_text

    show_any_text()
    try:
        code = run()
        if sys.stdout is not None:  # where it was closed before we began
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except HeadwiseError as error:
        return _fail(_short(one_line(str(error))))
    except typer.TyperException as error:
        read = _command_read(sys.argv[1:] if arguments is None else arguments)
        return _fail(f"{one_line(error.format_message()).rstrip('.')}; see {read} --help")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        return _fail("this needs Transformers; run: pip install 'headwise[hf]'")
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except BrokenPipeError:
        # the reader of our output has left (`headwise generate | head`): nothing more to say
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        code = _fail(f"{error.strerror}: make room")
        _drop_output()
        return code


def _fail(reason: str) -> int:
    print(f"headwise: error: {reason}", file=sys.stderr)  # noqa: T201
    return 2


def _command_read(arguments: list[str]) -> str:
    """The command that the first words name: "headwise bench ops"."""
    from headwise.cli.app import command

    names, group = ["headwise"], command()
    for word in arguments:
        if word not in getattr(group, "commands", {}):
            break
        names.append(word)
        group = group.commands[word]
    return " ".join(names)


def _drop_output() -> None:
    """Nothing is written any more, also not when the interpreter flushes stdout on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(text: str) -> str:
    """A message that quotes a whole file is cut in its middle."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-290:]}"
