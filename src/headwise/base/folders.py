"""Folders that are written whole or not at all: filled under another name, then renamed."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


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
