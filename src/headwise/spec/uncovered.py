"""A layer that headwise does not cover, and why."""

from dataclasses import dataclass

from headwise.errors import SpecError
from headwise.spec.dtypes import Dtype


@dataclass(frozen=True)
class Uncovered:
    """What stands in a `LayerSpec` for a layer that neither attends nor keeps a state known here.

    >>> print(Uncovered("convolution"))
    convolution

    Args:
        reason: what the layer is, in a few words.

    Raises:
        SpecError: the reason is empty.
    """

    reason: str

    def __post_init__(self) -> None:
        if not self.reason:
            raise SpecError("reason is empty: say what the layer is that is not covered")

    def cache_bytes(self, context: int, batch: int = 1, dtype: Dtype = "bfloat16") -> int:
        """0: nothing is known of a cache."""
        return 0

    def flops(self, query_length: int, context: int) -> int:
        """0: none are counted."""
        return 0

    def __str__(self) -> str:
        return self.reason
