"""A choice of keys as one value: what it is made from, and what it may take."""

from dataclasses import dataclass

from torch import Tensor

from headwise.ops.views import QuantKV
from headwise.spec import SparseChoice


@dataclass(frozen=True)
class Budget:
    """How many keys a query gets.

    Args:
        most: keys at most.
        least: keys at least, where there are so many; for `mass` alone.
        mass: choose as few as have this part of the weight, from `least` to `most`; None chooses
            `most` keys.
        first, recent: the first and the last keys that a query sees, which it gets in any case.
    """

    most: int
    least: int = 0
    mass: float | None = None
    first: int = 0
    recent: int = 0

    def within(self, context: int) -> "Budget":
        """The same for so many keys: counts that are no larger.

        >>> Budget(most=100, least=20, first=4, recent=64).within(30)
        Budget(most=30, least=20, mass=None, first=4, recent=26)
        """
        most = max(1, min(self.most, context))
        first = min(self.first, most)
        recent = min(self.recent, most - first)
        return Budget(most, min(self.least, most), self.mass, first, recent)

    @classmethod
    def of(cls, choice: SparseChoice) -> "Budget":
        """What a layer's choice allows."""
        return cls(choice.most, choice.least, choice.mass, choice.sinks, choice.recent)


@dataclass(frozen=True, eq=False)
class ChoiceCall:
    """A call of `headwise.ops.choose_keys`: checked, and complete."""

    query: Tensor
    sketch: QuantKV
    budget: Budget
    scale: float
    softcap: float | None
    sinks: Tensor | None
    causal: bool
    mask: Tensor | None
