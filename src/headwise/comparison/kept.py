"""A comparison's folder: one file a finished run, one of the speed, so that it can be resumed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from headwise.comparison.speed import DecodeRate, Rate, Speed
from headwise.comparison.train import Point, Run
from headwise.errors import OptionError
from headwise.measure.results import write_whole

_Found = TypeVar("_Found")


class Kept:
    """The files of a folder that `configuration.claim` has made this comparison's.

    Raises, in each method:
        OptionError: a file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, mechanism: str, seed: int) -> Run | None:
        """A finished run, None where there is none."""
        return _read(self._run(mechanism, seed), _run)

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
        return make(json.loads(path.read_bytes())) if path.exists() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"{path} cannot be read ({error}); delete it, and it is made anew"
        ) from error


def _write(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _run(held: dict[str, Any]) -> Run:
    return Run(**held | {"curve": tuple(Point(**at) for at in held["curve"])})


def _speed(held: dict[str, Any]) -> Speed:
    decode = tuple(DecodeRate(at["context"], Rate(**at["rate"])) for at in held["decode"])
    return Speed(**held | {"training": Rate(**held["training"]), "decode": decode})
