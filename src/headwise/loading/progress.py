"""The bars of Transformers and of its hub, led to a `Progress`."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def gguf_progress(progress: Progress, stage: str) -> Iterator[None]:
    """While open, the bar of Transformers' GGUF reader goes to `progress`.

    It is the one bar that has no hook, and is looked up in its module for each file.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    before, reader.tqdm = reader.tqdm, bar_class(progress, stage)
    try:
        yield
    finally:
        reader.tqdm = before
