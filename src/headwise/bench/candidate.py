"""A candidate of a benchmark: one way to compute what the others compute too."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.measure.shape import Shape
from headwise.ops import Bits, Explanation

# Makes a set of inputs ready; what it returns runs them and is done when it returns: [B, H, S, V].
Bind = Callable[[Any], Callable[[], Tensor]]


@dataclass(frozen=True)
class Absent:
    """A candidate that cannot run, and why."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """One way to compute attention.

    `missing` says why it cannot run on this machine at all, None if it can. `build` makes ready
    (compiles, say) for a shape and a first set of inputs, and returns what binds a set, or why this
    shape cannot be run. `held` gives the inputs as the candidate holds them where it rounds them,
    to `bits` bits: its result is compared with what the reference makes of those.
    """

    name: str
    about: str
    missing: Callable[[], str | None]
    build: Callable[[Shape, Any], Bind | Absent]
    held: Callable[[Any], Any] | None = None
    bits: Bits | None = None


def on_each(run: Callable[[Any], Tensor]) -> Bind:
    """For a candidate that has nothing to make ready for a set of inputs."""
    return lambda inputs: functools.partial(run, inputs)


def never_missing() -> str | None:
    """For a candidate that needs PyTorch only."""
    return None


def how(explanation: Explanation) -> str:
    """Which of headwise's backends runs, and how."""
    return f"{explanation.runs.backend}: {explanation.runs.reason}"


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message that says something.

    >>> first_line(RuntimeError("the backend raised:\n  no C++ compiler\n\nSet VERBOSE=1"))
    'the backend raised: no C++ compiler'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
