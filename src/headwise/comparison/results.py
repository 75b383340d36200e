"""What a comparison found, as data that is written as JSON and CSV."""

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwise.base.written import as_json, write_whole
from headwise.comparison.configuration import Configuration
from headwise.comparison.models import feed_forward, parameters
from headwise.comparison.speed import Speed
from headwise.comparison.task import Metric
from headwise.comparison.training import Run
from headwise.comparison.verdict import SeedScores, state
from headwise.measure.environment import environment, now


@dataclass
class Comparison:
    """All that was asked and found; `runs` and `speeds` are those that are finished.

    `metric` is what the mechanisms are judged by and `baseline` that of a model which has not
    learnt what the task is about: 1 / pairs for recall and beyond (any value of the sequence), the
    loss by the frequency of bytes for text.
    """

    configuration: Configuration
    metric: Metric
    baseline: float
    runs: list[Run] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=environment)

    @property
    def complete(self) -> bool:
        """Whether every run is finished and the speed measured."""
        asked = len(self.configuration.mechanisms) * self.configuration.seeds
        return len(self.runs) == asked and len(self.speeds) > 0

    def qualities(self, metric: Metric | None = None) -> list[SeedScores]:
        """A metric (the one to judge by) of each mechanism that has a finished run."""
        name, values = metric or self.metric, dict[str, list[float]]()
        for run in self.runs:
            values.setdefault(run.mechanism, []).append(getattr(run, name))
        return [
            SeedScores(mechanism, tuple(values[mechanism]))
            for mechanism in self.configuration.mechanisms
            if mechanism in values
        ]

    def verdict(self) -> list[str]:
        """What can be said of each two mechanisms, and what not, as sentences."""
        return state(self.qualities(), self.metric, self.baseline)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each mechanism; None for what is not known yet."""
        rows = {name: self._size(name) for name in self.configuration.mechanisms}
        metrics: tuple[Metric, ...] = ("loss", "accuracy")
        for metric in metrics:
            qualities = {quality.mechanism: quality for quality in self.qualities(metric)}
            for name, row in rows.items():
                quality = qualities.get(name)
                row["seeds"] = 0 if quality is None else len(quality.values)
                row[metric] = None if quality is None else quality.mean
                row[f"{metric}_deviation"] = None if quality is None else quality.deviation
        for speed in self.speeds:
            rows[speed.mechanism].update(speed.row())
        return list(rows.values())

    def write(self, folder: Path) -> None:
        """Write results.json and results.csv, each atomically.

        Raises:
            OptionError: a file cannot be written.
        """
        write_whole(folder / "results.json", (as_json(self.to_dict(), indent=1) + "\n").encode())
        rows, table = self.rows(), io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / "results.csv", table.getvalue().encode())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "when": now(),
            "configuration": self.configuration.settings(),
            "metric": self.metric,
            "baseline": self.baseline,
            "complete": self.complete,
            "verdict": self.verdict(),
            "mechanisms": self.rows(),
            "runs": [asdict(run) for run in self.runs],
            "speeds": [asdict(speed) for speed in self.speeds],
            "environment": self.environment,
        }

    def _size(self, mechanism: str) -> dict[str, Any]:
        inner = feed_forward(self.configuration, mechanism)
        return {
            "mechanism": mechanism,
            "attention": "; ".join(dict.fromkeys(map(str, self.configuration.mixers(mechanism)))),
            "cache_bytes_per_sequence": self.configuration.sequence_bytes(mechanism),
            "parameters": parameters(self.configuration, mechanism, inner),
            "feed_forward": inner,
        }
