"""Files and folders that are written atomically, and JSON that every reader takes."""

import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

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


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `folder` at the end; after an error it is gone.

    What a killed process left under such a name is removed first. `folder` must not exist then.

    Raises:
        OSError: it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    part = folder.parent / f".{folder.name}.part-{os.getpid()}"
    part.mkdir()
    try:
        yield part
        for path in sorted(part.iterdir()):
            if path.is_file():
                sync(path)
        sync(part)
        part.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left of `folder`."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.part-*"):
        owner = leftover.name.rpartition("-")[2]
        if owner.isdecimal() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder; it orders renames itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
