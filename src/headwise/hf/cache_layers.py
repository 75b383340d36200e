"""headwise's caches as Transformers cache layers."""

import copy
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.caches import (
    ContiguousCache,
    PagedCache,
    QuantizedCache,
    Sketch,
    WindowCache,
)
from headwise.caches.sketch import held_rows
from headwise.errors import ShapeError, UnsupportedError
from headwise.hf.cached_rows import CachedRows, SparseKV, WindowKV, rows_of
from headwise.hf.sparse import MOST_QUERIES
from headwise.hf.stock_names import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from headwise.spec import SparseChoice


class OwnLayer(CacheLayerMixin):
    """One layer of a Transformers cache, held in a cache of headwise.

    `keys` and `values` are views trimmed to what is held, and never change. MLA modules store their
    latent and their rope key under these names, [B, 1, L, R] and [B, 1, L, P].

    What a buffer that is written in place cannot do (appends while gradients are enabled, keys that
    a user assigns) turns the layer, for good, into the one that Transformers would have made.
    """

    is_croppable = True
    cache: Any
    sparse: SparseChoice | None = None  # how queries of few tokens choose their keys
    failed = False  # whether it did not take tokens that layers before it may hold
    sketch: Sketch

    def __init__(self, cache: Any) -> None:
        # not super().__init__(): it assigns keys and values, which would turn the layer into stock
        self.cache = cache
        self.sketch = Sketch()
        self.device: torch.device | None = None

    def __copy__(self) -> "OwnLayer":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.cache, twin.sketch = copy.copy(self.cache), copy.copy(self.sketch)
        return twin

    @property
    def keys(self) -> Tensor | None:
        """[B, K, L, D], a view."""
        return self._held(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._become_stock()
        self.keys = keys

    @property
    def values(self) -> Tensor | None:
        """[B, K, L, V], a view."""
        return self._held(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._become_stock()
        self.values = values

    @property
    def is_initialized(self) -> bool:
        """Whether memory has been allocated."""
        return bool(self.cache.reserved_bytes) or self.keys is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these, and hold none of them."""
        self.device = key_states.device
        self._append(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, K, S, D] and [B, K, S, V]; views of all that these tokens may see."""
        # a backward pass has to reach the keys, and no gradient flows through a buffer
        if torch.is_grad_enabled():
            self._become_stock()
            return self.update(key_states, value_states, *args, **kwargs)
        self.device = key_states.device
        try:
            return self._updated(key_states, value_states)
        except Exception:  # whatever it is: layers before this one have read the tokens
            self.failed = True
            raise

    def _updated(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        views = self._append(key_states, value_states)
        if self.sparse is None or not self.chooses(key_states.shape[2], self.cache.length):
            self.cache.read_ahead()
            return views
        sketch = self.sketch.view(self.cache, key_states)
        means = self.sketch.means(self.cache, key_states.shape[2])
        values = partial(held_rows, self.cache, 1)
        kv = SparseKV(*views, sketch, means, values, self.cache.read_ahead, self.sparse)
        return rows_of(kv, key_states.dtype)

    def chooses(self, queries: int, length: int) -> bool:
        """Whether the last queries of a context of `length` get some of its keys alone."""
        rule = self.sparse
        few = rule is not None and queries <= MOST_QUERIES and length > rule.least
        return few and self.cache.starts is None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next update returns, and the position of the first."""
        return self.cache.held + query_length, self.cache.length - self.cache.held

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cache.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (Transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ShapeError(
                f"crop({tokens_to_remove}): expected a negative number, the tokens to remove"
            )
        if self.is_initialized:
            # Transformers 5.17 passes a tensor
            self.cache.crop(max(0, self.cache.length + int(tokens_to_remove)))
            self.sketch.crop(self.cache.length)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.cache.reset()
        self.sketch.reset()
        self.failed = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        self.cache.reorder(beam_idx)
        self.sketch.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.keys is not None:
            index = torch.arange(self.keys.shape[0], device=self.keys.device)
            self._select_all(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`: whatever can index the batch dimension."""
        if self.keys is not None:
            self._select_all(torch.arange(self.keys.shape[0], device=self.keys.device)[indices])

    def offload(self) -> None:
        """Move what is held to main memory."""
        self.cache.to("cpu")
        self.sketch.to("cpu")

    def prefetch(self) -> None:
        """Move what is held back to where it was made."""
        if self.device is not None:
            self.cache.to(self.device)
            self.sketch.to(self.device)

    def _select_all(self, index: Tensor) -> None:
        self.cache.select(index)
        self.sketch.select(index)

    def _held(self, which: int) -> Tensor | None:
        rows: Tensor | None = self.cache.first if which == 0 else self.cache.second
        return rows

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        views: tuple[Tensor, Tensor] = self.cache.append(keys, values)
        return views

    def _become_stock(self) -> None:
        stock = self._stock()
        keys, values, device = self.keys, self.values, self.device
        if isinstance(keys, CachedRows) and isinstance(values, CachedRows):
            keys, values = keys.dense(), values.dense()
        self.__dict__.clear()
        self.__class__ = type(stock)
        self.__dict__.update(stock.__dict__)
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.device = keys, values, device

    @abstractmethod
    def _stock(self) -> DynamicLayer:
        """An empty layer as Transformers would have made it, that has seen as many tokens."""


class ContiguousLayer(OwnLayer):
    """A layer that holds every token; by default in a `ContiguousCache`."""

    is_sliding = False

    def __init__(self, cache: Any = None) -> None:
        super().__init__(ContiguousCache() if cache is None else cache)

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def _stock(self) -> DynamicLayer:
        return DynamicLayer()


class ViewLayer(ContiguousLayer):
    """A layer that holds every token in pages or as integers, and hands out a view of them."""

    cache: PagedCache | QuantizedCache

    def __init__(self, cache: PagedCache | QuantizedCache) -> None:
        super().__init__(cache)
        self.dtype = torch.float32

    def _held(self, which: int) -> Tensor | None:
        view = self.cache.view
        return None if view is None else rows_of(view, self.dtype)[which]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.dtype = keys.dtype
        return rows_of(self.cache.append(keys, values), self.dtype)


class SinksLayer(ContiguousLayer):
    """A layer of full attention cut down to a window and the first tokens (StreamingLLM).

    Masks are made for the whole context, as for any layer of full attention; our attention function
    takes out of them the keys that are left.
    """

    cache: WindowCache

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens, whether held or not."""
        return self.cache.length + query_length, 0

    def activate_past_recording(self) -> None:
        """Keep every token until the next `crop`, as assisted decoding asks."""
        self.cache.recording = True

    def _held(self, which: int) -> Tensor | None:
        key, value = self.cache.first, self.cache.second
        if key is None or value is None:
            return None
        return self._rows(key, value, 0)[which]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.cache.append(keys, values)
        return self._rows(key, value, keys.shape[2])

    def _rows(self, key: Tensor, value: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        cache = self.cache
        view = WindowKV(
            key,
            value,
            cache.columns(queries),
            cache.length,
            cache.mask(queries),
            whole=key.shape[2] == cache.length <= cache.window + cache.sinks,
        )
        return rows_of(view, key.dtype)

    def _stock(self) -> DynamicLayer:
        if self.cache.length > self.cache.held:
            raise UnsupportedError(
                "a window cache cannot go on while gradients are enabled: use torch.no_grad()"
            )
        return DynamicLayer()


class WindowLayer(OwnLayer):
    """A layer with a sliding window, in a `WindowCache`."""

    is_sliding = True
    cache: WindowCache

    def __init__(self, sliding_window: int) -> None:
        super().__init__(WindowCache(sliding_window))

    @property
    def sliding_window(self) -> int:
        """Tokens that a query sees, itself among them."""
        return self.cache.window

    @property
    def cumulative_length(self) -> int:
        """Tokens seen, under Transformers' name."""
        return self.cache.length

    @property
    def record_past(self) -> bool:
        """Whether every token is kept until the next `crop`."""
        return self.cache.recording

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self.cache.recording = record

    def activate_past_recording(self) -> None:
        """Keep every token until the next `crop`, as assisted decoding asks."""
        self.cache.recording = True

    def get_max_length(self) -> int:
        """The window."""
        return self.cache.window

    def _stock(self) -> DynamicLayer:
        stock = DynamicSlidingWindowLayer(self.cache.window)
        stock.cumulative_length = self.cache.length
        stock.record_past = self.cache.recording
        return stock
