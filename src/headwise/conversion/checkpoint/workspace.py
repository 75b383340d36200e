"""What an interrupted conversion with tuning resumes from: a hidden folder beside its result."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headwise.base.files import one_line, read_bytes, read_json, require_file
from headwise.base.written import written_whole
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.companions import NAMES, copy_companions
from headwise.errors import LoadError, OptionError

_RECORD = "state.json"


class Workspace:
    """The folder .NAME.work beside the folder NAME that will be made.

    Args:
        out: the result's folder.
        identity: everything that the conversion follows from, as values that JSON keeps.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = out.parent / f".{out.name}.work", identity
        self.tuning, self._converted = self.folder / "tuning", self.folder / "converted"

    def convert(self, write: Callable[[Path], list[float]]) -> list[float]:
        """Have `write` make the converted checkpoint where that has not been done, atomically.

        Returns:
            the errors of the layers, as `write` gave them.

        Raises:
            OptionError: the folder is another conversion's.
            LoadError: its record cannot be read.
        """
        if self._converted.is_dir():
            work = "conversion that was interrupted"
            with resumed(self._converted, self.identity, self.folder, work) as record:
                return [float(error) for error in record["errors"]]
        with written_whole(self._converted) as part:
            errors = write(part)
            write_record(part, self.identity, errors=errors)
        return errors

    @cached_property
    def converted(self) -> Checkpoint:
        """The converted checkpoint, opened once."""
        return Checkpoint(self._converted)

    def copy_to(self, part: Path) -> None:
        """Copy everything of the converted checkpoint but its weights and the record."""
        copy_companions(self._converted, part, ("config.json", *NAMES))

    def remove(self) -> None:
        """Leave nothing to resume from."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def resumed(
    state: Path, identity: Mapping[str, Any], folder: Path, work: str
) -> Iterator[dict[str, Any]]:
    """The record in the folder `state`; while open, what is wrong with its files is one line.

    Args:
        state: the folder that `write_record` wrote into.
        identity: what the work follows from now.
        folder: what to remove to restart.
        work: in words, what `folder` is of.

    Raises:
        LoadError: a file cannot be read.
        OptionError: the record's identity is another one; says what differs.
    """
    try:
        with one_line("it is no record"):
            record = read_json(state / _RECORD)
            before = record["identity"]
            changes = [
                f"{name} {before.get(name)}, now {value}"
                for name, value in identity.items()
                if before.get(name) != value
            ]
            if changes:
                raise OptionError(
                    f"{folder} holds another {work} ({'; '.join(changes)}): ask for the same to "
                    "resume it, or remove the folder to restart"
                )
            yield record
    except LoadError as error:
        raise LoadError(f"{state} cannot be read ({error}); remove {folder} to restart") from error


def write_record(state: Path, identity: Mapping[str, Any], **values: Any) -> None:
    """Write `values` into the folder `state`, with the identity: all that they follow from."""
    record = {"identity": identity, **values}
    (state / _RECORD).write_text(json.dumps(record), encoding="utf-8")


def model_state(folder: Path) -> str:
    """16 hex digits of what a model's folder contains now, and of what converts it.

    They follow from its config and from the names, sizes and times of its weight files.
    """
    sha = hashlib.sha256(read_bytes(folder / "config.json"))
    sha.update(version("headwise").encode())
    for file in sorted(folder.glob("*.safetensors")):
        status = file.stat()
        sha.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]


def file_digest(file: Path) -> str:
    """16 hex digits of the sha256 of a file."""
    require_file(file)
    with one_line(f"{file} cannot be read"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
