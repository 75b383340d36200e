"""A whole comparison: every run, then the speed; what a folder has already is not done again."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwise.base.figure import write_figure
from headwise.base.files import local_path
from headwise.base.progress import Progress, silent
from headwise.comparison.beyond import BeyondTask
from headwise.comparison.configuration import DEFAULT, Configuration
from headwise.comparison.folder import ComparisonFolder
from headwise.comparison.models import feed_forward
from headwise.comparison.recall import RecallTask
from headwise.comparison.results import Comparison
from headwise.comparison.speed import CONTEXTS, ROUNDS, check_contexts, measure_speed
from headwise.comparison.task import Task
from headwise.comparison.text import TextTask, read
from headwise.comparison.training import train
from headwise.errors import OptionError
from headwise.measure.machine import check_threads, use_threads
from headwise.measure.timing import check_rounds

FIGURE = "figure.svg"


def compare(
    mechanisms: Sequence[str] = DEFAULT,
    *,
    text: str | Path | None = None,
    out: str | Path | None = None,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    progress: Progress = silent,
    **settings: Any,
) -> Comparison:
    """Train small decoders that differ in the attention alone, and measure what each costs.

    Example:
        >>> import headwise
        >>> comparison = headwise.compare(
        ...     ["mha", "mqa"],
        ...     steps=2,
        ...     seeds=2,
        ...     width=16,
        ...     heads=2,
        ...     pairs=2,
        ...     vocabulary=8,
        ...     batch=16,
        ...     contexts=[64],
        ...     rounds=4,
        ... )
        >>> [(row["mechanism"], row["cache_bytes_per_token"]) for row in comparison.rows()]
        [('mha', 256), ('mqa', 128)]

    Args:
        mechanisms: "mha", "gqa:2" (2 kv heads), "mqa", "mla", "mla:24" (a latent of 24),
            "gated-delta", "kda", "ssd", "retention", "hybrid:3-1" (three layers of gated-delta, one
            of mha), "memory" (a window, and a memory), ...
        text: a file to learn, byte by byte; None: associative recall, or with task="beyond" recall
            over a distance.
        out: a folder for the results; a finished run that it holds is not done again.
        contexts: tokens in the cache when decoding is timed.
        rounds: how often each mechanism is timed.
        progress: told the stage, and the steps that are done and that there are.
        settings: the other settings of `headwise.comparison.Configuration`.

    Raises:
        OptionError: a setting that cannot be; a folder of another comparison.
        CapacityError: caches of these contexts would not fit in memory.
    """
    content = None
    if text is not None:
        content, settings["text"] = read(local_path(text, kind=OptionError))
        settings.setdefault("task", "text")
    listed = isinstance(mechanisms, Sequence) and not isinstance(mechanisms, str)
    if not (listed and all(isinstance(name, str) for name in mechanisms)):
        raise OptionError(f"mechanisms is {mechanisms!r}, expected names, as ['mha', 'gqa:2']")
    configuration = Configuration(mechanisms=tuple(mechanisms), **settings)
    experiment = Experiment(configuration, content, out, contexts, rounds)
    experiment.carry_out(progress)
    return experiment.comparison


class Experiment:
    """A comparison to carry out; `comparison` has what is finished, also after an interruption.

    `content` is the text, for the task text. Everything is checked before any work is done.

    Raises:
        OptionError, CapacityError: as `compare` does.
    """

    def __init__(
        self,
        configuration: Configuration,
        content: bytes | None,
        out: str | Path | None,
        contexts: Sequence[int] = CONTEXTS,
        rounds: int = ROUNDS,
    ) -> None:
        check_threads(configuration.threads)
        check_rounds(rounds)
        for name in configuration.mechanisms:
            feed_forward(configuration, name)
        self.contexts, self.rounds = check_contexts(configuration, contexts), rounds
        self.task: Task
        if content is not None:
            self.task = TextTask(content, configuration)
        else:
            self.task = (BeyondTask if configuration.task == "beyond" else RecallTask)(
                configuration
            )
        self.folder: ComparisonFolder | None = None
        if out is not None:
            self.folder = ComparisonFolder(local_path(out, kind=OptionError), configuration)
        self.comparison = Comparison(configuration, self.task.metric, self.task.baseline)

    def carry_out(self, progress: Progress = silent) -> None:
        """Train what is not trained yet, measure the speed if it is not measured, write it all."""
        with use_threads(self.comparison.configuration.threads):
            try:
                self._train(progress)
                self._measure(progress)
            finally:
                if self.folder is not None:
                    self._write(self.folder.path)

    def _train(self, progress: Progress) -> None:
        configuration, runs = self.comparison.configuration, self.comparison.runs
        runs += [] if self.folder is None else self.folder.runs()
        finished, steps = {(run.mechanism, run.seed) for run in runs}, configuration.steps
        # seed by seed: an interrupted comparison has something of each mechanism
        seeds = range(configuration.seeds)
        missing = [(name, seed) for seed in seeds for name in configuration.mechanisms]
        missing = [run for run in missing if run not in finished]
        for index, (name, seed) in enumerate(missing):
            stage = f"training {index + 1} of {len(missing)}: {name}, seed {seed}"

            def told(step: int, stage: str = stage, before: int = index * steps) -> None:
                progress(stage, before + step, len(missing) * steps)

            run = train(configuration, self.task, name, seed, progress=told)
            if self.folder is not None:
                self.folder.add_run(run)
            runs.append(run)

    def _measure(self, progress: Progress) -> None:
        speeds = [] if self.folder is None else self.folder.speeds(self.contexts)
        if not speeds:
            speeds = measure_speed(
                self.comparison.configuration,
                self.task,
                contexts=self.contexts,
                rounds=self.rounds,
                progress=progress,
            )
            if self.folder is not None:
                self.folder.write_speeds(speeds)
        self.comparison.speeds = speeds

    def _write(self, folder: Path) -> None:
        self.comparison.write(folder)
        if self.comparison.complete and importlib.util.find_spec("matplotlib") is not None:
            from headwise.comparison.plot import draw

            write_figure(draw(self.comparison), folder / FIGURE)
