"""What a benchmark found, as data that is written as JSON; times in seconds, sizes in bytes."""

import datetime
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from headwise.base.written import as_json, write_whole
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
