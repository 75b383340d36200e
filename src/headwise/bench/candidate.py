"""A candidate of a benchmark: one way to compute what the others compute too."""

import functools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from headwise.measure.inputs import Inputs
from headwise.ops import Bits

# Makes a set of inputs ready; what it returns runs them and is done when it returns: [B, H, S, V].
# Inputs are of the class that the candidate's operators have.
Bind = Callable[[Any], Callable[[], Tensor]]


# The operators of headwise.ops that a candidate may compute.
BOTH = ("attention", "latent_attention")


@dataclass(frozen=True)
class Candidate:
    """One way to compute attention.

    `build` makes ready (compiles, say) for a first set of inputs, and returns what binds a set of
    that shape; it raises UnsupportedError for one that it cannot run. `missing` says why the
    candidate cannot run on this machine at all, None if it can. `operators` are those of
    `headwise.ops` that it computes. `rounded` gives the inputs as the candidate
    stores them where it rounds them, to `bits` bits: its result is compared with what the reference
    makes of those.
    """

    name: str
    about: str
    build: Callable[[Any], Bind]
    _: KW_ONLY
    missing: Callable[[], str | None] = lambda: None
    operators: tuple[str, ...] = ("attention",)
    rounded: Callable[[Inputs], Inputs] | None = None
    bits: Bits | None = None


def on_each(run: Callable[[Any], Tensor]) -> Bind:
    """For a candidate that has nothing to make ready for a set of inputs."""
    return lambda inputs: functools.partial(run, inputs)


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message that says something.

    >>> first_line(RuntimeError("the backend raised:\n  no C++ compiler\n\nSet VERBOSE=1"))
    'the backend raised: no C++ compiler'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
