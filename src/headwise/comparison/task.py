"""What a task gives to training and to its judgement."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Metric = Literal["accuracy", "loss"]
"""What mechanisms are judged by: accuracy (more is better) or loss (less is)."""

IGNORED = -100
"""The target of a position that is not asked."""


@dataclass(frozen=True)
class Batch:
    """tokens [B, S] int64 and, for each, the token that is to be said there, or `IGNORED`."""

    tokens: Tensor
    targets: Tensor


class Task(Protocol):
    """Batches to train on, and held-out ones to judge by."""

    metric: Metric
    """What the mechanisms are judged by."""
    baseline: float
    """That metric of a model which has not learnt what the task is about."""

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """What step `step` (from 0) trains on."""

    def held_out(self) -> list[Batch]:
        """What no step trains on; the same at each call."""
