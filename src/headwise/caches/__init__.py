"""KV caches: they own memory and positions, nothing else."""

from headwise.caches.contiguous import ContiguousCache

__all__ = ["ContiguousCache"]
