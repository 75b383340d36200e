"""What a comparison found, as data that is written as JSON and CSV."""

import csv
import datetime
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwise.base.written import as_json, write_whole
from headwise.comparison.configuration import Configuration
from headwise.comparison.mechanisms import parse
from headwise.comparison.models import build, feed_forward
from headwise.comparison.speed import Speed
from headwise.comparison.task import Metric
from headwise.comparison.train import Run
from headwise.comparison.verdict import Quality, state
from headwise.measure.environment import environment


@dataclass
class Comparison:
    """All that was asked and found; `runs` and `speeds` are those that are finished.

    `metric` is what the mechanisms are judged by and `baseline` that of a model which has not
    learnt what the task is about: 1 / pairs for recall (any value of the sequence), the loss by the
    frequency of bytes for text.
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

    def qualities(self, metric: Metric | None = None) -> list[Quality]:
        """A metric (the one to judge by) of each mechanism that has a finished run."""
        name = metric or self.metric
        found = []
        for mechanism in self.configuration.mechanisms:
            runs = [run for run in self.runs if run.mechanism == mechanism]
            if runs:
                found.append(Quality(mechanism, tuple(getattr(run, name) for run in runs)))
        return found

    def verdict(self) -> list[str]:
        """What can be said of each two mechanisms, and what not, as sentences."""
        return state(self.qualities(), self.metric, self.baseline)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each mechanism; None for what is not known yet."""
        losses = {at.mechanism: at for at in self.qualities("loss")}
        accuracies = {at.mechanism: at for at in self.qualities("accuracy")}
        speeds = {at.mechanism: at for at in self.speeds}
        rows = []
        for name in self.configuration.mechanisms:
            row: dict[str, Any] = {"mechanism": name, **self._size(name)}
            for metric, known in (("loss", losses), ("accuracy", accuracies)):
                quality = known.get(name)
                row["seeds"] = 0 if quality is None else len(quality.values)
                row[metric] = None if quality is None else quality.mean
                row[f"{metric}_deviation"] = None if quality is None else quality.deviation
            row |= _speed(speeds.get(name))
            rows.append(row)
        return rows

    def write(self, folder: Path) -> None:
        """Write results.json and results.csv, each whole or not at all.

        Raises:
            OptionError: a file cannot be written.
        """
        write_whole(folder / "results.json", (as_json(self.to_dict(), indent=1) + "\n").encode())
        rows = self.rows()
        table = io.StringIO()
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(table, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / "results.csv", table.getvalue().encode())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
        at = self.configuration
        model = build(at, mechanism, seed=0)
        return {
            "attention": str(parse(mechanism, at.heads, at.head_dim)),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "feed_forward": feed_forward(at, mechanism),
        }


def _speed(speed: Speed | None) -> dict[str, Any]:
    if speed is None:
        return {}
    return {
        "cache_bytes_per_token": speed.cache_bytes_per_token,
        "training_tokens_per_second": speed.training.tokens_per_second,
        "peak_memory": speed.peak_memory,
    } | {f"decode_tokens_per_second_{at.context}": at.rate.tokens_per_second for at in speed.decode}
