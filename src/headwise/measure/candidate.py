"""A candidate of a benchmark: one way to compute what the others compute too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.measure.shape import Shape

# One call on a set of inputs, done when it returns: [B, H, S, V] of any layout.
Run = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Absent:
    """A candidate that cannot run, and why."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """One way to compute attention.

    `missing` says why it cannot run on this machine at all, None if it can. `build` makes ready
    (compiles, say) for a shape and a first set of inputs, and returns what runs a set, or why this
    shape cannot be run.
    """

    name: str
    about: str
    missing: Callable[[], str | None]
    build: Callable[[Shape, Any], Run | Absent]


def never_missing() -> str | None:
    """For a candidate that needs PyTorch only."""
    return None
