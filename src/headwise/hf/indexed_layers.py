"""Cache layers of sparse attention: what a layer holds, and beside it the keys of its indexer."""

import copy
from typing import Any

import torch
from torch import Tensor

from headwise.caches import ContiguousCache
from headwise.hf.cache_layers import ContiguousLayer, OwnLayer, ViewLayer
from headwise.hf.stock_names import DynamicLayer


class IndexKeys(OwnLayer):
    """The keys of an indexer, [B, L, E], in a cache of their own that grows in place.

    They are never rounded: of a key that is not chosen nothing is seen. Under MiniMax' names they
    are [B, 1, L, E].
    """

    def __init__(self, cache: Any, kind: type[DynamicLayer]) -> None:
        super().__init__(cache)
        self.kind = kind  # of the layer that Transformers would have made
        self.index = ContiguousCache()
        # what an indexer has made of groups of keys, counted from these tokens
        self._pools = ContiguousCache()
        self._pooled_from: tuple[int, ...] = ()
        # [dims, B, L], where a model keeps its positions here (Qwen4)
        self.indexer_position_ids: Tensor | None = None

    def __copy__(self) -> "IndexKeys":
        twin = super().__copy__()
        assert isinstance(twin, IndexKeys)
        twin.index, twin._pools = copy.copy(self.index), copy.copy(self._pools)
        return twin

    @property
    def indexer_keys(self) -> Tensor | None:
        """[B, L, E], a view."""
        return None if self.index.first is None else self.index.first.squeeze(1)

    @property
    def index_nbytes(self) -> int:
        """Bytes that the indexer's keys take, and what is made of groups of them."""
        return self.index.nbytes + self._pools.nbytes

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether memory has been allocated for the indexer's keys."""
        return self.index.first is not None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append [B, S, E]; a view of all."""
        if torch.is_grad_enabled():  # as `update`
            self._become_stock()
            stock: Tensor = self.update_indexer(indexer_key_states)
            return stock
        keys = indexer_key_states.unsqueeze(1)
        return self.index.append(keys, keys[..., :0])[0].squeeze(1)

    @property
    def idx_keys(self) -> Tensor | None:
        """[B, 1, L, E], a view."""
        return self.index.first

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Append [B, 1, S, E]; a view of all."""
        return self.index.append(idx_k, idx_k[..., :0])[0]

    def pools(self, first: tuple[int, ...]) -> ContiguousCache:
        """Pools of groups of keys that are counted from the tokens `first`, one per sequence."""
        if first != self._pooled_from:
            self._pools, self._pooled_from = ContiguousCache(), first
        return self._pools

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens."""
        before = self.cache.length
        super().crop(tokens_to_remove)
        kept = max(0, self.index.length - (before - self.cache.length))
        self.index.crop(kept)
        self._drop_pools()
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :kept]

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.index.reset()
        self._drop_pools()
        self.indexer_position_ids = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.index.batch is not None:
            self._select(torch.arange(self.index.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`: whatever can index the batch dimension."""
        super().batch_select_indices(indices)
        if self.index.batch is not None:
            self._select(torch.arange(self.index.batch, device=indices.device)[indices])

    def offload(self) -> None:
        """Move what is held to main memory."""
        super().offload()
        self.index.to("cpu")
        self._drop_pools()

    def prefetch(self) -> None:
        """Move what is held back to where it was made."""
        super().prefetch()
        if self.device is not None:
            self.index.to(self.device)

    def _drop_pools(self) -> None:
        self._pools, self._pooled_from = ContiguousCache(), ()

    def _select(self, index: Tensor) -> None:
        self.index.select(index)
        if self._pooled_from:
            self._pools.select(index)
            self._pooled_from = tuple(self._pooled_from[i] for i in index.tolist())
        if self.indexer_position_ids is not None:
            own = index.to(self.indexer_position_ids.device)
            self.indexer_position_ids = self.indexer_position_ids.index_select(1, own)

    def _stock(self) -> Any:
        stock: Any = self.kind()
        if hasattr(stock, "idx_keys"):
            stock.idx_keys = self.idx_keys
            return stock
        stock.indexer_position_ids = self.indexer_position_ids
        if self.indexer_keys is not None:
            stock.lazy_initialization_indexer(self.indexer_keys)
            stock.indexer_keys = self.indexer_keys
        return stock


class IndexedLayer(IndexKeys, ContiguousLayer):
    """A layer that holds every token, and its indexer's keys."""


class IndexedViewLayer(IndexKeys, ViewLayer):
    """A layer that holds every token in pages or as integers, and its indexer's keys."""
