"""The cache layer of a context that several processes hold."""

import torch
from torch import Tensor

from headwise.hf.cache_layers import ContiguousLayer
from headwise.hf.cached_rows import SplitKV, rows_of
from headwise.hf.parallel.ranks import RankCache
from headwise.ops import PagedKV, QuantKV


class SplitLayer(ContiguousLayer):
    """A layer that is given every token and holds a rank's; what it hands out stands for all.

    Whatever touches that but our attention function gets a dense copy, gathered from all ranks.
    """

    cache: RankCache

    def __init__(self, cache: RankCache) -> None:
        super().__init__(cache)
        self.dtype = torch.float32

    def _held(self, which: int) -> Tensor | None:
        own = self.cache.own
        if own.gives == "rows":
            given = None if own.first is None else (own.first, own.second)
        else:
            given = own.view
        return None if given is None else self._rows(given)[which]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.dtype = keys.dtype
        return self._rows(self.cache.append(keys, values))

    def _rows(self, own: tuple[Tensor, Tensor] | PagedKV | QuantKV) -> tuple[Tensor, Tensor]:
        cache = self.cache
        return rows_of(SplitKV(own, cache, cache.length, cache.ranks.gather), self.dtype)
