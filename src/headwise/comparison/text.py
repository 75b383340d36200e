"""Byte-level language modelling on any file."""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from headwise.base.files import local_path, read_bytes
from headwise.comparison.configuration import Configuration
from headwise.comparison.task import Batch, Metric
from headwise.errors import LoadError, OptionError

# One of so many bytes is held out, at the end of the file.
_HELD_OUT_SHARE = 10
_HELD_OUT_TOKENS = 2**17
_BATCH = 64


def read(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and their SHA-256.

    Raises:
        OptionError: it cannot be read.
    """
    try:
        content = read_bytes(local_path(path))
    except LoadError as error:
        raise OptionError(str(error)) from error
    return content, hashlib.sha256(content).hexdigest()


class TextTask:
    """Windows of a file's first 9/10 to train on, and of its last 1/10 to judge by.

    `baseline` is the loss of a model that knows how frequent each byte is, and nothing else.

    >>> task = TextTask(b"ab" * 50_000, Configuration(task="text", text="its SHA-256", length=8))
    >>> task.batch(0, torch.Generator().manual_seed(0)).tokens.shape
    torch.Size([256, 8])
    >>> round(task.baseline, 2)  # two bytes, equally frequent
    0.7

    Raises:
        OptionError: the file is too short for a window in each part.
    """

    metric: Metric = "loss"

    def __init__(self, content: bytes, configuration: Configuration) -> None:
        self.length, self.count = configuration.length, configuration.batch // configuration.length
        split = len(content) - len(content) // _HELD_OUT_SHARE
        least = _HELD_OUT_SHARE * (self.length + 1)
        if len(content) < least:
            raise OptionError(
                f"the text has {len(content):,} bytes, expected at least {least:,}: the tenth that "
                f"is held out must hold a window of {self.length} and the byte after it"
            )
        # a copy: a tensor over `bytes` could be written to
        content_bytes = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.training, self.judging = content_bytes[:split], content_bytes[split:]
        self.baseline = _cross_entropy(self.training, self.judging)

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Windows from anywhere in the part to train on, whatever the step."""
        starts = torch.randint(len(self.training) - self.length, (self.count,), generator=generator)
        return self._windows(self.training, starts)

    def held_out(self) -> list[Batch]:
        """Windows that do not overlap, of 131,072 bytes at most, spread over the part."""
        starts = torch.arange(0, len(self.judging) - self.length, self.length)
        most = max(1, _HELD_OUT_TOKENS // self.length)
        if len(starts) > most:
            starts = starts[torch.arange(most) * len(starts) // most]
        return [self._windows(self.judging, some) for some in starts.split(_BATCH)]

    def _windows(self, part: Tensor, starts: Tensor) -> Batch:
        windows = part[starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1], windows[:, 1:])


def _cross_entropy(training: Tensor, judging: Tensor) -> float:
    """Nats per byte of `judging` by the frequencies in `training`, each byte counted once more."""
    chances = (torch.bincount(training.int(), minlength=256) + 1).double()
    chances /= chances.sum()
    frequencies = torch.bincount(judging.int(), minlength=256).double() / len(judging)
    loss = -(frequencies * chances.log()).sum().item()
    assert math.isfinite(loss)
    return loss
