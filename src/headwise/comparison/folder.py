"""A comparison's folder: its settings, a file for each finished run, and one for the speed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from headwise.base.files import MOST_JSON, kind_of, one_line, read_bytes, read_json, reason
from headwise.base.records import record
from headwise.base.written import write_whole
from headwise.comparison.configuration import Configuration
from headwise.comparison.speed import Speed
from headwise.comparison.training import Run
from headwise.errors import LoadError, OptionError
from headwise.spec.mechanism import mechanism_name

_Record = TypeVar("_Record")


class ComparisonFolder:
    """A folder that is this comparison's from now on, or was before: then it can be resumed.

    Raises:
        OptionError: it holds another comparison (the first setting that differs is named), or
            something else; a file of it cannot be read or written. So does each method.
    """

    def __init__(self, path: Path, configuration: Configuration) -> None:
        self.path, self.configuration = path, configuration
        settings, file = configuration.settings(), path / "configuration.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            new = kind_of(file) == "none"
            other = new and any(path.iterdir())
        except (LoadError, OSError) as error:
            raise OptionError(f"{path}: {reason(error)}; give another folder") from error
        if other:
            raise OptionError(f"{path} is not empty and holds no comparison; give a new folder")
        if new:
            _write(file, settings)
        else:
            _check_same(path, file, settings)

    def runs(self) -> list[Run]:
        """The finished runs, seed by seed."""
        runs = []
        for seed in range(self.configuration.seeds):
            for mechanism in self.configuration.mechanisms:
                file = self._run_file(mechanism, seed)
                run = _read(file, lambda data: _with_name(record(Run, data)))
                if run is None:
                    continue
                if (run.mechanism, run.seed) != (mechanism, seed):
                    raise OptionError(
                        f"{file} is of {run.mechanism}, seed {run.seed}; delete it to have it made "
                        "again"
                    )
                runs.append(run)
        return runs

    def add_run(self, run: Run) -> None:
        """Write a finished run."""
        _write(self._run_file(run.mechanism, run.seed), asdict(run))

    def speeds(self, contexts: Sequence[int]) -> list[Speed]:
        """The speeds at these contexts; empty where they are not measured."""
        speeds = _read(
            self.path / "speed.json",
            lambda data: [_with_name(record(Speed, each)) for each in data],
        )
        wanted = list(contexts)
        known = all([each.context for each in speed.decode] == wanted for speed in speeds or [])
        return speeds if speeds and known else []

    def write_speeds(self, speeds: Sequence[Speed]) -> None:
        """Write the speeds; to have them measured again, delete the file."""
        _write(self.path / "speed.json", [asdict(speed) for speed in speeds])

    def _run_file(self, mechanism: str, seed: int) -> Path:
        # not every system takes a colon in a name
        return self.path / f"run-{mechanism.replace(':', '-')}-seed{seed}.json"


def _check_same(folder: Path, file: Path, settings: dict[str, Any]) -> None:
    try:
        stored = read_json(file)
    except LoadError as error:
        raise OptionError(f"{error}; give a new folder") from error
    names = stored.get("mechanisms")
    if isinstance(names, list):
        stored["mechanisms"] = [mechanism_name(str(name)) for name in names]
    stored.setdefault("equal", "parameters")  # older folders do not say
    for name in dict.fromkeys([*settings, *stored]):
        if stored.get(name) != settings.get(name):
            raise OptionError(
                f"{folder} holds a comparison with {name} {_shown(stored.get(name))}, not "
                f"{_shown(settings.get(name))}; give another folder, or the same settings"
            )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(file: Path, make: Callable[[Any], _Record]) -> _Record | None:
    try:
        if kind_of(file) == "none":
            return None
        with one_line(f"{file} is no such record"):
            return make(json.loads(read_bytes(file, most=MOST_JSON)))
    except LoadError as error:
        raise OptionError(
            f"{file} cannot be read ({error}); delete it to have it made again"
        ) from error


def _write(file: Path, content: Any) -> None:
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def _with_name(stored: Any) -> Any:
    """The record with its mechanism in today's spelling."""
    return replace(stored, mechanism=mechanism_name(stored.mechanism))
