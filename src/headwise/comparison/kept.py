"""A comparison's folder: one file a finished run, one of the speed, so that it can be resumed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from headwise.base.files import MOST_JSON, kind_of, one_line, read_bytes
from headwise.base.written import write_whole
from headwise.comparison.speed import DecodeRate, Rate, Speed
from headwise.comparison.train import Point, Run
from headwise.errors import LoadError, OptionError

_Found = TypeVar("_Found")

# The types that a record's fields have in JSON; the others are records themselves.
_TYPES: dict[Any, Any] = {
    int: int,
    float: int | float,
    str: str,
    int | None: int | None,
}


class Kept:
    """The files of a folder that `configuration.claim` has made this comparison's.

    Raises, in each method:
        OptionError: a file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, mechanism: str, seed: int) -> Run | None:
        """A finished run, None where there is none."""
        found = _read(self._run(mechanism, seed), _run)
        if found is not None and (found.mechanism, found.seed) != (mechanism, seed):
            raise OptionError(
                f"{self._run(mechanism, seed)} is of {found.mechanism}, seed {found.seed}; delete "
                "it, and it is made anew"
            )
        return found

    def keep_run(self, run: Run) -> None:
        """Write a finished run."""
        _write(self._run(run.mechanism, run.seed), asdict(run))

    def speeds(self, contexts: Sequence[int]) -> list[Speed]:
        """The speeds at these contexts; empty where they are not measured."""
        found = _read(self.folder / "speed.json", lambda held: [_speed(at) for at in held]) or []
        known = all([at.context for at in speed.decode] == list(contexts) for speed in found)
        return found if known else []

    def keep_speeds(self, speeds: Sequence[Speed]) -> None:
        """Write the speeds; to measure them anew, delete the file."""
        _write(self.folder / "speed.json", [asdict(speed) for speed in speeds])

    def _run(self, mechanism: str, seed: int) -> Path:
        return self.folder / f"run-{mechanism}-seed{seed}.json"


def _read(path: Path, make: Callable[[Any], _Found]) -> _Found | None:
    try:
        if kind_of(path) == "none":
            return None
        with one_line(f"{path} is no such record"):
            return make(json.loads(read_bytes(path, most=MOST_JSON)))
    except LoadError as error:
        raise OptionError(
            f"{path} cannot be read ({error}); delete it, and it is made anew"
        ) from error


def _write(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _run(held: dict[str, Any]) -> Run:
    return _typed(Run(**held | {"curve": tuple(_typed(Point(**at)) for at in held["curve"])}))


def _speed(held: dict[str, Any]) -> Speed:
    decode = tuple(
        _typed(DecodeRate(at["context"], _typed(Rate(**at["rate"])))) for at in held["decode"]
    )
    training = _typed(Rate(**held["training"]))
    return _typed(Speed(**held | {"training": training, "decode": decode}))


def _typed(record: _Found) -> _Found:
    """The record, if its numbers are numbers and its words are words.

    Raises:
        TypeError: names the field that is not.
    """
    for at in fields(record):  # type: ignore[arg-type]
        value = getattr(record, at.name)
        wanted = _TYPES.get(at.type)
        if wanted is not None and not isinstance(value, wanted):
            raise TypeError(f"{at.name} is {value!r}")
    return record
