"""What a benchmark found, as data that is written as JSON; times in seconds, sizes in bytes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from headwise.base.written import as_json, write_whole
from headwise.measure.environment import environment, now
from headwise.measure.machine import Figures
from headwise.measure.timing import Ratio, Timing, ratio


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
    """headwise on a shape over headwise on the one beside it: seconds per cached token."""

    label: str
    threads: int
    ratio: Ratio


def is_headwise(name: str) -> bool:
    """Whether a row is headwise's: "headwise", or "headwise, 8,192 tokens" beside it."""
    return name.partition(",")[0] == "headwise"


def over_headwise(name: str, timings: Mapping[str, Timing]) -> Ratio | None:
    """How many times as long a candidate takes as headwise; None for headwise, or without it."""
    ours = timings.get("headwise")
    return None if is_headwise(name) or ours is None else ratio(timings[name], ours)


class _Result:
    """What the results of a shape and of a model have in common."""

    left_out: tuple[LeftOut, ...]

    @property
    def headwise_wrong(self) -> bool:
        """Whether headwise itself gave a wrong result."""
        return any(each.state == "wrong" and is_headwise(each.name) for each in self.left_out)


@dataclass(frozen=True)
class ShapeResult(_Result):
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


@dataclass(frozen=True)
class AtContext:
    """A model's next tokens at one context.

    `prefill_seconds` is one reading of the context; `seconds` the median per token over
    rounds, `low` and `high` the quartiles; `ratio` how many times as long a token takes as with
    headwise; `error` the norm of the difference of the logits to stock's, over theirs.
    """

    context: int
    prefill_seconds: float
    seconds: float
    low: float
    high: float
    ratio: Ratio | None
    error: float


@dataclass(frozen=True)
class ModelTimed:
    """One way to run a model.

    `slope` is seconds that a token takes longer for 1,000 more cached ones, between the shortest
    and the longest context; `peak_memory` bytes above the weights while the longest context was
    read, None where the system does not say; `cache_bytes` those of the cache at its end, None
    where a peer does not say.
    """

    name: str
    how: str
    contexts: tuple[AtContext, ...]
    slope: float | None
    peak_memory: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class ModelResult(_Result):
    """A model in one dtype; `weight_bytes` is what its weights take."""

    model: str
    dtype: str
    threads: int
    weight_bytes: int
    rounds: int
    tolerance: float
    timed: tuple[ModelTimed, ...]
    left_out: tuple[LeftOut, ...]


@dataclass
class Report:
    """One run of a benchmark: what was asked, on what, and what was found."""

    command: str
    figures: list[Figures] = field(default_factory=list)
    absent: list[LeftOut] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    interrupted: bool = False
    when: str = field(default_factory=now)
    environment: dict[str, Any] = field(default_factory=environment)

    @contextmanager
    def recording(self, path: Path | None) -> Iterator[None]:
        """Write what was measured to `path`, also after Ctrl-C, which ends the block, or an error.

        The report is written as JSON, atomically.

        Raises:
            OptionError: the file cannot be written.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            if path is not None and (self.figures or self.results):
                write_whole(path, (as_json(asdict(self), indent=1) + "\n").encode())
