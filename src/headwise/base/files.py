"""Files from outside, read in one place: whatever is wrong with one is a LoadError in one line.

Where a file is meant, what is not an ordinary file is refused before it is opened: opening a FIFO
waits for a writer for ever, and a device may have no end.
"""

import json
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from headwise.errors import HeadwiseError, LoadError

# What damaged or foreign data makes a reader raise: the system's errors, values out of range
# (UnicodeDecodeError is one), fields of the wrong type or missing ones, structures that are cut
# short or nest too deeply (RecursionError is a RuntimeError), sizes that no memory holds.
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
    MemoryError,
)

# For readers that raise anything at all when a file is damaged: tokenizers raises Exception itself,
# and behind a GGUF's header stand numpy, dataclasses of huggingface_hub with errors of their own
# and all of Transformers. A list of types was tried, and a bit flipped elsewhere went past it.
ANYTHING = (Exception,)

# No config or index is larger; the safetensors format caps its headers at the same size.
MOST_JSON = 100_000_000
# Characters of a name, and of what a library says, that a message repeats.
_MOST_NAME, _MOST_REASON = 200, 300

CACHE_VARIABLE = "HEADWISE_CACHE"

Kind = Literal["folder", "file", "other", "none"]


@contextmanager
def one_line(
    what: str,
    *,
    kind: type[HeadwiseError] = LoadError,
    faults: tuple[type[Exception], ...] = FAULTS,
) -> Iterator[None]:
    """Turn what reading foreign data raises into one line: `what`, then the reason.

    Our own errors and an exhausted device pass as they are, and so does what is none of `faults`.

    >>> with one_line("index.json is no index"):
    ...     {}["weight_map"]
    Traceback (most recent call last):
    headwise.errors.LoadError: index.json is no index: 'weight_map' is missing

    Raises:
        LoadError: or `kind`.
    """
    try:
        yield
    except (HeadwiseError, torch.OutOfMemoryError):
        raise
    except faults as error:
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, short and on one line.

    >>> reason(FileNotFoundError(2, "No such file or directory", "x"))
    'No such file or directory'
    """
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding}"
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"[:_MOST_REASON]
    if isinstance(error, MemoryError) and not str(error):
        return "it does not fit in memory"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:_MOST_REASON] or type(error).__name__


def local_path(text: str | Path, *, kind: type[HeadwiseError] = LoadError) -> Path:
    """A path as a user gives it, with ~ expanded; nothing has to be there.

    Raises:
        LoadError: or `kind`: not a path, or one that the system cannot have.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        why = "no such home folder" if isinstance(error, RuntimeError) else reason(error)
        name = repr(text) if len(repr(text)) <= _MOST_NAME else f"{repr(text)[:_MOST_NAME]}..."
        raise kind(f"{name} cannot be a path: {why}") from error
    return path


def kind_of(path: Path) -> Kind:
    """What is at a path, links followed.

    Raises:
        LoadError: the system does not say, as in a folder that may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "none"
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {reason(error)}") from error
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def require_file(path: Path, what: str = "", wanted: str = "a file") -> None:
    """Refuse what is not an ordinary file; `what` stands before the path in the message.

    Raises:
        LoadError: says what is there instead.
    """
    named = f"{what} {path}".strip()
    kind = kind_of(path)
    if kind == "none":
        raise LoadError(f"{named} cannot be read: No such file or directory")
    if kind != "file":
        other = "a folder" if kind == "folder" else "a pipe, a socket or a device"
        raise LoadError(f"{named} is not a file; give {wanted}, not {other}")


def read_bytes(path: Path, what: str = "", *, most: int | None = None) -> bytes:
    """All bytes of a file.

    Raises:
        LoadError: it cannot be read, or has more than `most` bytes.
    """
    require_file(path, what)
    named = f"{what} {path}".strip()
    with one_line(f"{named} cannot be read"):
        size = path.stat().st_size
        if most is not None and size > most:
            raise LoadError(f"{named} has {size:,} bytes, expected {most:,} at most")
        return path.read_bytes()


def read_text(path: Path, what: str = "") -> str:
    """A file as UTF-8 text, its ends of line as newlines.

    Raises:
        LoadError: it cannot be read, or is not UTF-8.
    """
    require_file(path, what, "a text file")
    named = f"{what} {path}".strip()
    with one_line(f"{named} cannot be read"):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LoadError(
                f"{named} is not UTF-8 text (byte {error.start}); convert it first"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file: a config, an index, a record.

    Raises:
        LoadError: it cannot be read, is not JSON, or holds something else than an object.
    """
    content = read_bytes(path, most=MOST_JSON)
    with one_line(f"{path} is not a readable JSON file"):
        data = json.loads(content)
    if not isinstance(data, dict):
        raise LoadError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data


def cache_folder(kind: str) -> Path:
    """The folder of one kind of thing: in $HEADWISE_CACHE, else in the user's cache folder.

    Raises:
        LoadError: what the variable says cannot be a path.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        try:
            return local_path(chosen) / kind
        except LoadError as error:
            raise LoadError(f"{CACHE_VARIABLE}: {error}; set it to a folder") from error
    import platformdirs

    return Path(platformdirs.user_cache_dir("headwise")) / kind
