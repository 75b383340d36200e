"""The kinds of linear attention, by the functions that their modules call."""

from collections.abc import Callable
from dataclasses import dataclass

from headwise.hf.linear.convolution import CONVOLUTION
from headwise.hf.linear.delta import GATED_DELTA, KIMI_DELTA
from headwise.hf.linear.function import Function
from headwise.hf.linear.ssd import SSD


@dataclass(frozen=True)
class Kind:
    """A kind of linear attention: the functions that its modules call, a convolution's among them.

    helpers: names that those functions use in their turn.
    """

    name: str
    functions: tuple[Function, ...]
    helpers: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], "Kind"], tuple[str]]:
        """Pickled by name."""
        return _named, (self.name,)


KINDS = (
    Kind("gated delta rule", (*GATED_DELTA, *CONVOLUTION), helpers=("l2norm",)),
    Kind("Kimi delta attention", (*KIMI_DELTA, *CONVOLUTION), helpers=("l2norm",)),
    Kind("state-space duality", (*SSD, *CONVOLUTION), helpers=("segment_sum",)),
)


def _named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
