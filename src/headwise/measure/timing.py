"""Times of several candidates in one process, taken in turn, so that a busy machine is fair to all.

Absolute times on a shared machine mean little; the ratio of two candidates timed within the same
round means something, and its spread says how much.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from headwise.base.progress import Progress, silent
from headwise.errors import OptionError

ROUNDS = 21


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile, seconds."""
        low, _, high = quantiles(self.seconds, n=4)
        return low, high

    def summary(self) -> dict[str, float]:
        """Seconds as a result has them: the median as `seconds`, the quartiles `low` and `high`."""
        low, high = self.quartiles
        return {"seconds": self.median, "low": low, "high": high}


@dataclass(frozen=True)
class Ratio:
    """How many times as long one candidate takes as another: median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        form = form or ".1f"
        return f"{self.median:{form}}x ({self.low:{form}}-{self.high:{form}})"

    def __str__(self) -> str:
        return format(self)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warmup: int = 3,
    before: Callable[[str], object] | None = None,
    progress: Progress = silent,
    stage: str = "timing",
) -> dict[str, Timing]:
    """Run every candidate once per round, in turn; each round starts with another one.

    Example:
        >>> timings = interleaved({"sum": lambda: sum(range(99)), "one": lambda: 1}, rounds=5)
        >>> {name: len(timing.seconds) for name, timing in timings.items()}
        {'sum': 5, 'one': 5}

    Args:
        candidates: name to a function without arguments, which must have finished its work when it
            returns.
        rounds: how often each is timed.
        warmup: rounds before those that count.
        before: called with a candidate's name before each of its turns, outside its time.
        progress: told the `stage` and the turns that are done, outside all times.

    Raises:
        OptionError: fewer than 4 rounds, of which no quartile can be taken.
    """
    check_rounds(rounds)
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for index, name in enumerate(names[first:] + names[:first]):
            progress(stage, turn * len(names) + index, (warmup + rounds) * len(names))
            if before is not None:
                before(name)
            began = time.perf_counter()
            candidates[name]()
            took = time.perf_counter() - began
            if turn >= warmup:
                seconds[name].append(took)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def check_rounds(rounds: int) -> None:
    """Raise OptionError for fewer rounds than a spread can be taken of."""
    if not isinstance(rounds, int) or rounds < 4:
        raise OptionError(f"rounds is {rounds!r}, expected at least 4 for a spread")


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """slow / fast, round by round.

    >>> print(ratio(Timing((4.0, 6.0, 8.0, 8.0)), Timing((2.0, 2.0, 2.0, 2.0))))
    3.5x (2.2-4.0)
    """
    pairs = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    low, _, high = quantiles(pairs, n=4)
    return Ratio(median(pairs), low, high)
