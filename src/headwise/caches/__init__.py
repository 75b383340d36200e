"""KV caches: they own memory and positions, nothing else."""

from headwise.caches.choice import Cache, CacheChoice
from headwise.caches.contiguous import ContiguousCache
from headwise.caches.paged import PagedCache
from headwise.caches.quantized import QuantizedCache
from headwise.caches.window import WindowCache

__all__ = ["Cache", "CacheChoice", "ContiguousCache", "PagedCache", "QuantizedCache", "WindowCache"]
