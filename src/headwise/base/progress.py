"""How work tells how far it is: a callable, so that no lower part knows about the screen."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `total` 0 means that the total is not known."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who does not want any."""
