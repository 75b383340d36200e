"""What a benchmark found, as data that is written as JSON; times in seconds, sizes in bytes."""

import datetime
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from headwise.errors import OptionError
from headwise.loading.files import local_path
from headwise.measure.environment import environment
from headwise.measure.machine import Figures
from headwise.measure.timing import Ratio


@dataclass(frozen=True)
class Timed:
    """A candidate that gave the right result, and its time.

    `seconds` is the median over rounds, `low` and `high` the quartiles; `ratio` how many times as
    long it takes as headwise; `roofline` the share that its rates are of the machine's; `error` the
    largest error of its result, relative to the largest number of the reference's.
    """

    name: str
    how: str
    threads: int
    error: float
    seconds: float
    low: float
    high: float
    ratio: Ratio | None
    bytes_per_second: float
    flops_per_second: float
    roofline: float


@dataclass(frozen=True)
class LeftOut:
    """A candidate that was not timed: "absent" could not run, "wrong" gave a wrong result."""

    name: str
    state: Literal["absent", "wrong"]
    reason: str


@dataclass(frozen=True)
class BesideResult:
    """headwise on a shape over headwise on the one beside it: seconds a cached token."""

    label: str
    threads: int
    ratio: Ratio


@dataclass(frozen=True)
class ShapeResult:
    """All candidates on one shape in one dtype.

    `bytes` and `flops` are what the call needs; `tolerance` is the largest error that passes;
    `cold` whether the caches were, and `note` what else there is to say about them.
    """

    shape: str
    description: str
    dtype: str
    threads: int
    bytes: int
    flops: int
    rounds: int
    tolerance: float
    cold: bool
    note: str
    timed: tuple[Timed, ...]
    left_out: tuple[LeftOut, ...]
    beside: BesideResult | None = None

    @property
    def headwise_wrong(self) -> bool:
        """Whether headwise itself gave a wrong result."""
        return any(
            at.state == "wrong" and at.name.partition(",")[0] == "headwise" for at in self.left_out
        )


@dataclass
class Report:
    """One run of a benchmark: what was asked, on what, and what was found."""

    command: str
    figures: list[Figures] = field(default_factory=list)
    absent: list[LeftOut] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    interrupted: bool = False
    when: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    environment: dict[str, Any] = field(default_factory=environment)

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            OptionError: the file cannot be written.
        """
        write_whole(path, (as_json(asdict(self), indent=1) + "\n").encode())


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
