"""KV caches: they own memory and positions, nothing else."""

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.window import WindowCache

__all__ = ["ContiguousCache", "WindowCache"]
