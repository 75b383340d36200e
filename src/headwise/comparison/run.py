"""A whole comparison: every run, then the speed; what a folder has already is not done again."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from headwise.base.files import local_path
from headwise.base.progress import Progress, silent
from headwise.comparison.configuration import Configuration, claim
from headwise.comparison.kept import Kept
from headwise.comparison.mechanisms import DEFAULT
from headwise.comparison.models import feed_forward
from headwise.comparison.recall import Recall
from headwise.comparison.results import Comparison
from headwise.comparison.speed import CONTEXTS, ROUNDS, check_contexts, measure_speed
from headwise.comparison.task import Task
from headwise.comparison.text import Text, read
from headwise.comparison.train import train
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
        >>> found = headwise.compare(
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
        >>> [(row["mechanism"], row["cache_bytes_per_token"]) for row in found.rows()]
        [('mha', 256), ('mqa', 128)]

    Args:
        mechanisms: "mha", "gqa-2" (2 kv heads), "mqa", "mla", "mla-24" (a latent of 24), ...
        text: a file to learn, byte by byte; None: associative recall.
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
        raise OptionError(f"mechanisms is {mechanisms!r}, expected names, as ['mha', 'gqa-2']")
    configuration = Configuration(mechanisms=tuple(mechanisms), **settings)
    work = Work(configuration, content, out, contexts, rounds)
    work.carry_out(progress)
    return work.comparison


class Work:
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
        self.contexts = check_contexts(configuration, contexts)
        self.rounds = rounds
        self.task: Task = Recall(configuration) if content is None else Text(content, configuration)
        self.kept: Kept | None = None
        if out is not None:
            folder = local_path(out, kind=OptionError)
            claim(folder, configuration)
            self.kept = Kept(folder)
        self.comparison = Comparison(configuration, self.task.metric, self.task.baseline)

    def carry_out(self, progress: Progress = silent) -> None:
        """Train what is not trained yet, measure the speed if it is not measured, write it all."""
        with use_threads(self.comparison.configuration.threads):
            try:
                self._train(progress)
                self._measure(progress)
            finally:
                if self.kept is not None:
                    self._write(self.kept.folder)

    def _train(self, progress: Progress) -> None:
        asked, kept, found = self.comparison.configuration, self.kept, self.comparison.runs
        # seed by seed: an interrupted comparison has something of each mechanism
        todo = []
        for seed in range(asked.seeds):
            for name in asked.mechanisms:
                run = None if kept is None else kept.run(name, seed)
                if run is None:
                    todo.append((name, seed))
                else:
                    found.append(run)
        total = len(todo) * asked.steps
        for at, (name, seed) in enumerate(todo):
            stage = f"training {at + 1} of {len(todo)}: {name}, seed {seed}"
            told = partial(_tell, progress, stage, at * asked.steps, total)
            run = train(asked, self.task, name, seed, progress=told)
            if kept is not None:
                kept.keep_run(run)
            found.append(run)

    def _measure(self, progress: Progress) -> None:
        asked, kept = self.comparison.configuration, self.kept
        speeds = [] if kept is None else kept.speeds(self.contexts)
        if not speeds:
            speeds = measure_speed(
                asked, self.task, contexts=self.contexts, rounds=self.rounds, progress=progress
            )
            if kept is not None:
                kept.keep_speeds(speeds)
        self.comparison.speeds = speeds

    def _write(self, folder: Path) -> None:
        self.comparison.write(folder)
        if self.comparison.complete and importlib.util.find_spec("matplotlib") is not None:
            from headwise.comparison.plot import write_figure

            write_figure(self.comparison, folder / FIGURE)


def _tell(progress: Progress, stage: str, before: int, total: int, step: int) -> None:
    progress(stage, before + step, total)
