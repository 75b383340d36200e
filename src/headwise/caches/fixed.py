"""A contiguous cache of one size: allocated once, and full when it is full."""

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.protocol import CacheKind
from headwise.errors import CapacityError, ShapeError


class FixedCache(ContiguousCache):
    """A `ContiguousCache` with room for `tokens`, allocated at the first append, never grown.

    Example:
        >>> import torch
        >>> from headwise.caches.fixed import FixedCache
        >>> cache = FixedCache(8)
        >>> key, value = cache.append(torch.randn(1, 3, 6, 64), torch.randn(1, 3, 6, 64))
        >>> cache.capacity, cache.length
        (8, 6)

    Args:
        tokens: of each sequence, at most.

    Raises:
        ShapeError: `tokens` is below 1.
    """

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ShapeError(f"tokens is {tokens}, expected at least 1")
        super().__init__()
        self.tokens = tokens

    @property
    def name(self) -> str:
        """As "fixed:4096"."""
        return f"{KIND.name}:{self.tokens}"

    def _room(self, needed: int, bytes_per_token: int) -> int:
        if needed > self.tokens:
            raise CapacityError(
                f"the cache holds {self.tokens:,} tokens ({self.tokens * bytes_per_token:,} "
                f"bytes), and {needed:,} are needed ({needed * bytes_per_token:,} bytes): take a "
                "larger one, or cache=contiguous, which grows"
            )
        return self.tokens


KIND = CacheKind(
    "fixed",
    ("fixed:N",),
    lambda size, sinks: FixedCache(size),
    lambda size, sinks: f"one buffer of {size} tokens",
    size=None,
    obstacle=lambda size: (
        None if size else ": a buffer of no tokens holds nothing, take fixed:4096"
    ),
)
