"""What reaches the terminal: text in its encoding, and progress on stderr."""

import io
import sys
import time
from contextlib import closing, suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from headwise.base.console import harmless, one_line


def show_any_text() -> None:
    """Let stdout and stderr replace what their encoding does not have, where it would raise.

    A stream in Latin-1 or ASCII shows a question mark, or on stderr the character's number.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        # a caller may have put a stream of another kind in place, or none
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            # one that became a pipe behind its back cannot be set, and keeps its ways
            with suppress(OSError):
                stream.reconfigure(errors=errors)


def interrupted(state: str = "") -> int:
    """Say on stderr that Ctrl-C ended the work, and how it stands; the command's exit code."""
    print(f"headwise: interrupted{state and f'; {one_line(state)}'}", file=sys.stderr)  # noqa: T201
    return 130


class Screen:
    """A progress bar on stderr, shown while work reports; plain lines where stderr is no terminal.

    An instance is a `headwise.loading.progress.Progress`. `animated` lets the bar move while its
    stage is silent, which takes a thread: not for work that is timed.
    """

    def __init__(self, *, animated: bool) -> None:
        # Its own file: sys.stderr may be replaced while a library's bar is read from it.
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
            auto_refresh=animated,
            refresh_per_second=8,
        )
        self.stage = ""
        self.task: TaskID | None = None
        self.drawn = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self._begin(stage)
        if self.task is None:
            return
        count = f"{done}/{total}" if 0 < total < 1_000_000 else ""
        self.bar.update(self.task, completed=done, total=total or None, count=count)
        now = time.monotonic()
        if now - self.drawn > 0.1 or done == total:
            self.bar.refresh()
            self.drawn = now

    def _begin(self, stage: str) -> None:
        self.stage = stage
        if not self.console.is_terminal:
            self.console.print(escape(harmless(stage)), highlight=False, soft_wrap=True)
            return
        if self.task is not None:
            self.bar.remove_task(self.task)
        else:
            self.bar.start()
        self.task = self.bar.add_task(escape(harmless(stage)), total=None, count="")

    def close(self) -> None:
        """Take the bar away."""
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.bar.stop()
        self.task, self.stage = None, ""


def screen(*, animated: bool) -> closing[Screen]:
    """A `Screen` that is taken away at the end, also after an error."""
    return closing(Screen(animated=animated))
