"""The bars of Transformers and of its hub, led to a `Progress`."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

from headwise.base.progress import Progress


def bar_class(progress: Progress, stage: str) -> type:
    """A class for libraries that take one for their tqdm bars; it draws nothing itself."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        monitor_interval = 0  # tqdm's thread that redraws a bar that has stalled

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # the hub's own addition to tqdm's arguments
            kwargs |= {"file": io.StringIO(), "mininterval": 0, "disable": False}
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            progress(stage, int(self.n), int(self.total or 0))

    return Bar


@contextmanager
def transformers_progress(progress: Progress, stage: str) -> Iterator[None]:
    """While open, the bar that Transformers shows for loading weights goes to `progress`."""
    from transformers.utils import logging

    bar = bar_class(progress, stage)
    before = logging.set_tqdm_hook(lambda factory, args, kwargs: bar(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, Transformers logs errors only: its hints are not for a command's user."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def tqdm_lines(progress: Progress, stage: str) -> Iterator[None]:
    """While open, "12/272" in a bar written to stderr goes to `progress`; other text passes.

    For the one bar that has no hook: Transformers' GGUF reader makes its own.
    """
    with redirect_stderr(_BarText(sys.stderr, progress, stage)):
        yield


class _BarText(io.TextIOBase):
    def __init__(self, stderr: TextIO, progress: Progress, stage: str) -> None:
        self.stderr, self.progress, self.stage, self.in_bar = stderr, progress, stage, False

    def write(self, text: str) -> int:
        found = re.search(r"\| (\d+)/(\d+) \[", text)
        if found:
            self.in_bar = True
            self.progress(self.stage, int(found[1]), int(found[2]))
        elif self.in_bar and not text.strip():
            self.in_bar = text != "\n"  # the bar's returns, then the newline that ends it
        else:
            self.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        self.stderr.flush()
