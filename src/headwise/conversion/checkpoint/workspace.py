"""What an interrupted conversion with tuning resumes from: a hidden folder beside its result."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headwise.base.files import one_line, read_bytes, require_file
from headwise.base.folders import written_whole
from headwise.conversion.checkpoint.companions import NAMES, copy_companions
from headwise.conversion.checkpoint.record import read_record, write_record
from headwise.errors import LoadError

_RECORD = "headwise-work.json"


class Workspace:
    """The folder .NAME.work beside the folder NAME that will be made.

    Args:
        out: the result's folder.
        identity: everything that the conversion follows from, as values that JSON keeps.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.parent / f".{out.name}.work"
        self.identity = identity
        self.converted, self.tuning = self.folder / "converted", self.folder / "tuning"

    def convert(self, write: Callable[[Path], list[float]]) -> list[float]:
        """Have `write` fill the folder `converted` where that has not been done, atomically.

        Returns:
            the errors of the layers, as `write` gave them.

        Raises:
            OptionError: the folder is another conversion's.
            LoadError: its record cannot be read.
        """
        record = self.converted / _RECORD
        if self.converted.is_dir():
            work = "conversion that was interrupted"
            try:
                values = read_record(record, self.identity, folder=self.folder, work=work)
                with one_line(f"{record} is no record of a conversion"):
                    return [float(error) for error in values["errors"]]
            except LoadError as error:
                raise LoadError(f"{error}; remove {self.folder} to restart") from error
        with written_whole(self.converted) as part:
            errors = write(part)
            write_record(part / _RECORD, self.identity, errors=errors)
        return errors

    def copy_to(self, part: Path) -> None:
        """Copy everything of the converted checkpoint but its weights and the record."""
        copy_companions(self.converted, part, ("config.json", *NAMES))

    def remove(self) -> None:
        """Leave nothing to resume from."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
