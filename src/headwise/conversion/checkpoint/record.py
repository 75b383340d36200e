"""A JSON record of what a folder was made for, so that only the same work resumes from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwise.base.files import one_line, read_json
from headwise.errors import OptionError

_IDENTITY = "identity"


def write_record(file: Path, identity: Mapping[str, Any], **values: Any) -> None:
    """Write `values` beside the identity: everything that they follow from, as JSON keeps it."""
    file.write_text(json.dumps({_IDENTITY: identity, **values}), encoding="utf-8")


def read_record(
    file: Path, identity: Mapping[str, Any], *, folder: Path, work: str
) -> dict[str, Any]:
    """Read the values of a record that has this identity; `work` names in words what `folder` is.

    Raises:
        LoadError: a file that cannot be read, or is no such record.
        OptionError: the identity differs; says how.
    """
    record = read_json(file)
    with one_line(f"{file} is no record of a {work}"):
        before = record[_IDENTITY]
        changes = [
            f"{name} {before.get(name)}, now {value}"
            for name, value in identity.items()
            if before.get(name) != value
        ]
    if changes:
        raise OptionError(
            f"{folder} holds another {work} ({'; '.join(changes)}): ask for the same to resume it, "
            "or remove the folder to restart"
        )
    return record
