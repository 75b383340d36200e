"""What an interrupted conversion with tuning goes on from: a hidden folder beside its result."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headwise.base.files import one_line, read_bytes, read_json, require_file
from headwise.base.folders import written_whole
from headwise.conversion.checkpoint.companions import NAMES, copy_companions
from headwise.errors import LoadError, OptionError

_RECORD = "headwise-work.json"


class Work:
    """The folder .NAME.work beside the folder NAME that will be made.

    Args:
        out: the result's folder.
        asked: everything that the conversion follows from, as values that JSON keeps.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.folder = out.parent / f".{out.name}.work"
        self.asked = dict(asked)

    @property
    def tuning(self) -> Path:
        """Where the tuning keeps its state."""
        return self.folder / "tuning"

    def converted(self, make: Callable[[Path], list[float]]) -> tuple[Path, list[float]]:
        """The converted checkpoint's folder and its layers' errors; made where it is not yet.

        Raises:
            OptionError: the folder is another conversion's.
            LoadError: its record cannot be read.
        """
        entry = self.folder / "converted"
        if entry.is_dir():
            try:
                record = read_json(entry / _RECORD)
                with one_line(f"{entry / _RECORD} is no record of a conversion"):
                    what = "conversion that was interrupted"
                    require_same(self.folder, what, record["asked"], self.asked)
                    return entry, [float(error) for error in record["errors"]]
            except LoadError as error:
                raise LoadError(f"{error}; remove {self.folder} to start anew") from error
        with written_whole(entry) as part:
            errors = make(part)
            record = {"asked": self.asked, "errors": errors}
            (part / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        return entry, errors

    def copy_to(self, part: Path) -> None:
        """Everything of the converted checkpoint but its weights and the record."""
        copy_companions(self.folder / "converted", part, ("config.json", *NAMES))

    def remove(self) -> None:
        """Nothing is left to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)


def require_same(
    folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise OptionError where `folder` was begun `before` with other arguments than `now`'s."""
    other = [
        f"{name} {before.get(name)}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if other:
        raise OptionError(
            f"{folder} holds another {what} ({'; '.join(other)}): ask for the same to go on with "
            "it, or remove the folder to start anew"
        )


def model_state(folder: Path) -> str:
    """16 hex digits of what a model's folder holds now, and of what converts it.

    Of its config and of names, sizes and times of its weight files.
    """
    sha = hashlib.sha256(read_bytes(folder / "config.json"))
    sha.update(version("headwise").encode())
    for file in sorted(folder.glob("*.safetensors")):
        found = file.stat()
        sha.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]


def file_digest(file: Path) -> str:
    """16 hex digits of the sha256 of a file."""
    require_file(file)
    with one_line(f"{file} cannot be read"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
