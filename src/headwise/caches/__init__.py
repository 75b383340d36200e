"""Caches of keys and values, or of states: they own memory and positions, nothing else."""

from headwise.caches.choice import CacheChoice
from headwise.caches.contiguous import ContiguousCache
from headwise.caches.disk import DiskCache
from headwise.caches.paged import PagedCache
from headwise.caches.protocol import Cache, CacheKind
from headwise.caches.quantized import QuantizedCache
from headwise.caches.sketch import Sketch, SketchedCache
from headwise.caches.split import Share, SplitCache
from headwise.caches.state import StateCache
from headwise.caches.window import WindowCache

__all__ = [
    "Cache",
    "CacheChoice",
    "CacheKind",
    "ContiguousCache",
    "DiskCache",
    "PagedCache",
    "QuantizedCache",
    "Share",
    "Sketch",
    "SketchedCache",
    "SplitCache",
    "StateCache",
    "WindowCache",
]
