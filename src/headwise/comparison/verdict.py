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
class Quality:
    """One metric of a mechanism, an entry a seed.

    >>> quality = Quality("mha", (0.5, 0.625, 0.75))
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


def pairs(qualities: Sequence[Quality], metric: Metric) -> list[Pair]:
    """Every two mechanisms, those that are furthest apart first.

    >>> found = pairs([Quality("mha", (0.9, 0.8)), Quality("mqa", (0.5, 0.7))], "accuracy")
    >>> found[0].better, round(found[0].difference, 2), round(found[0].spread, 2), found[0].differ
    ('mha', 0.25, 0.2, True)
    """
    found = []
    for two in combinations(qualities, 2):
        better, worse = sorted(two, key=lambda at: at.mean, reverse=metric == "accuracy")
        difference, spread = abs(better.mean - worse.mean), max(better.spread, worse.spread)
        seeds = min(len(better.values), len(worse.values))
        differ = None if seeds < 2 else difference > spread
        found.append(Pair(better.mechanism, worse.mechanism, difference, spread, differ))
    return sorted(found, key=lambda pair: pair.difference, reverse=True)


def state(qualities: Sequence[Quality], metric: Metric, baseline: float) -> list[str]:
    """The verdict as sentences: one for each two mechanisms, and what else limits it."""
    lines = []
    if any(len(at.values) < 2 for at in qualities):
        lines.append("one seed cannot tell a difference from chance: run 3 or more")
    learnt = {at.mechanism: _learnt(at, metric, baseline) for at in qualities}
    full = {at.mechanism for at in qualities if metric == "accuracy" and min(at.values) > _FULL}
    for pair in pairs(qualities, metric):
        two = {pair.better, pair.worse}
        if not any(learnt[name] for name in two):
            lines.append(f"{pair.better} and {pair.worse}: neither has learnt the task")
        elif two <= full:
            lines.append(f"{pair.better} and {pair.worse}: both have learnt all of it")
        else:
            lines.append(_sentence(pair, metric))
    lines += [
        f"{at.mechanism}: learnt with {learnt[at.mechanism]} of {len(at.values)} seeds in these "
        f"steps ({metric} past {_LEARNT[metric] * baseline:.3f})"
        for at in qualities
        if learnt[at.mechanism] < len(at.values)
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


def _learnt(quality: Quality, metric: Metric, baseline: float) -> int:
    """Seeds with which the task was learnt at all."""
    needed = _LEARNT[metric] * baseline
    return sum(at > needed if metric == "accuracy" else at < needed for at in quality.values)
