"""What one token adds to the cache of an attention layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheRows:
    """The two rows per head that a token adds, and an indexer's key.

    Keys and values of the kv heads; for MLA the latent and the rope key, which all heads share.

    >>> CacheRows(heads=8, dims=(128, 64)).elements
    1536

    Args:
        heads: K, or 1 for MLA.
        dims: (D, V), or (R, P) for MLA.
        index_dim: elements of an indexer's key, 0 without an indexer.
    """

    heads: int
    dims: tuple[int, int]
    index_dim: int = 0

    @property
    def elements(self) -> int:
        """Elements that one token takes."""
        return self.heads * sum(self.dims) + self.index_dim
