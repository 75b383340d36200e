"""Files that are written whole or not at all, and JSON that every reader takes."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from headwise.base.files import local_path
from headwise.errors import OptionError


def as_json(data: Any, *, indent: int | None = None) -> str:
    """Plain data as JSON that every reader takes: what is no number there becomes null.

    >>> as_json({"perplexity": float("inf"), "tokens": (1, 2)})
    '{"perplexity": null, "tokens": [1, 2]}'
    """
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def check_writable(path: Path) -> None:
    """Refuse a file whose folder does not exist or cannot be written, before any work is done.

    Raises:
        OptionError: says which folder.
    """
    place = local_path(path, kind=OptionError)
    folder = place.absolute().parent
    if not os.path.isdir(folder):
        raise OptionError(f"{path}: the folder {folder} does not exist; make it first")
    # what is replaced must be an ordinary file: never a folder, a pipe or a device
    other = os.path.lexists(place) and not os.path.isfile(place)
    if not place.name or other or not os.access(folder, os.W_OK):
        raise OptionError(f"{path} cannot be written; give a file in a folder of yours")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary sibling, so that it is never there in part.

    Raises:
        OptionError: the file cannot be written.
    """
    path = local_path(path, kind=OptionError)
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error
