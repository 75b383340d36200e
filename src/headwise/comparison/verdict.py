"""What a comparison allows to say: which mechanisms differ by more than the seeds do."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev

from headwise.comparison.task import Metric

# How far from the baseline a model must be for its task to count as learnt at all.
_LEARNT = {"accuracy": 2.0, "loss": 0.9}
# The accuracy above which what is left says nothing of the mechanism.
_FULL = 0.99


@dataclass(frozen=True)
class SeedScores:
    """One metric of a mechanism, one entry per seed.

    >>> quality = SeedScores("mha", (0.5, 0.625, 0.75))
    >>> quality.mean, quality.spread
    (0.625, 0.25)
    """

    mechanism: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float:
        """The largest less the smallest."""
        return max(self.values) - min(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation between the seeds, None of one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Pair:
    """Two mechanisms: by how much the better one is better, and how far seeds are apart.

    `differ` is whether their means are further apart than the seeds of either; None with one seed.
    """

    better: str
    worse: str
    difference: float
    spread: float
    differ: bool | None


def pairs(qualities: Sequence[SeedScores], metric: Metric) -> list[Pair]:
    """Every two mechanisms, those that are furthest apart first.

    >>> qualities = [SeedScores("mha", (0.9, 0.8)), SeedScores("mqa", (0.5, 0.7))]
    >>> (pair,) = pairs(qualities, "accuracy")
    >>> pair.better, round(pair.difference, 2), round(pair.spread, 2), pair.differ
    ('mha', 0.25, 0.2, True)
    """
    judged = []
    for two in combinations(qualities, 2):
        better, worse = sorted(two, key=lambda each: each.mean, reverse=metric == "accuracy")
        difference, spread = abs(better.mean - worse.mean), max(better.spread, worse.spread)
        seeds = min(len(better.values), len(worse.values))
        differ = None if seeds < 2 else difference > spread
        judged.append(Pair(better.mechanism, worse.mechanism, difference, spread, differ))
    return sorted(judged, key=lambda pair: pair.difference, reverse=True)


def state(qualities: Sequence[SeedScores], metric: Metric, baseline: float) -> list[str]:
    """The verdict as sentences: one for each two mechanisms, and what else limits it."""
    lines = []
    if any(len(quality.values) < 2 for quality in qualities):
        lines.append("one seed cannot tell a difference from chance: run 3 or more")
    needed = _LEARNT[metric] * baseline
    learnt = {
        quality.mechanism: sum(
            value > needed if metric == "accuracy" else value < needed for value in quality.values
        )
        for quality in qualities
    }
    full = {
        quality.mechanism
        for quality in qualities
        if metric == "accuracy" and min(quality.values) > _FULL
    }
    for pair in pairs(qualities, metric):
        if not learnt[pair.better] and not learnt[pair.worse]:
            lines.append(f"{pair.better} and {pair.worse}: neither has learnt the task")
        elif {pair.better, pair.worse} <= full:
            lines.append(f"{pair.better} and {pair.worse}: both have learnt all of it")
        else:
            lines.append(_sentence(pair, metric))
    lines += [
        f"{quality.mechanism}: learnt with {learnt[quality.mechanism]} of {len(quality.values)} "
        f"seeds in these steps ({metric} past {needed:.3f})"
        for quality in qualities
        if learnt[quality.mechanism] < len(quality.values)
    ]
    if len(full) > 1:
        lines.append("what has learnt all of it could only be set apart by a harder task")
    return lines


def _sentence(pair: Pair, metric: Metric) -> str:
    apart = f"{metric} {pair.difference:.3f} apart"
    if pair.differ is None:
        return f"{pair.better} and {pair.worse}: {apart}"
    seeds = f"{apart}, seeds up to {pair.spread:.3f}"
    if pair.differ:
        return f"{pair.better} is better than {pair.worse}: {seeds}"
    return f"{pair.better} and {pair.worse}: no difference shown: {seeds}"
