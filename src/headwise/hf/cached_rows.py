"""What a cache layer gives the attention function where keys and values are not two tensors."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from headwise.caches import SplitCache
from headwise.errors import UnsupportedError
from headwise.ops import PagedKV, QuantKV
from headwise.spec import SparseChoice


@dataclass(frozen=True, eq=False)
class WindowKV:
    """What a window with sinks leaves of a context, [B,K,L',D] and [B,K,L',V].

    columns: the positions of the L' keys, of `length` seen. visible: boolean [1,1,S,L'], or None
    where the S queries of the update see them all. whole: nothing is left out, or hidden but by
    causality.
    """

    key: Tensor
    value: Tensor
    columns: Tensor
    length: int
    visible: Tensor | None
    whole: bool

    def mask(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """The mask over L' keys: of `visible`, and of one over the whole context, as it came.

        queries: how many there are. A layer that shares the keys of another may be given the last
        ones of the update alone (Gemma 4).
        """
        visible = None if self.visible is None else self.visible[..., -queries:, :]
        if mask is None:
            return visible
        mask = mask[..., self.columns] if mask.shape[-1] == self.length else mask
        if visible is None:
            return mask
        if mask.dtype == torch.bool:
            return mask & visible
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


@dataclass(frozen=True, eq=False)
class SparseKV:
    """All keys and values of a layer, [B,K,L,D] and [B,K,L,V], as it hands them out otherwise.

    sketch: of the keys, by which each query chooses as many as `rule` says. means: of the values up
    to each query, float32 [B,K,S,V]. values: those of tokens `begin` to `end`, [B,K,end-begin,V].
    read_ahead: is told which are chosen, int32 [B,K,S,T].
    """

    key: Tensor
    value: Tensor
    sketch: QuantKV
    means: Tensor
    values: Callable[[int, int], Tensor]
    read_ahead: Callable[[Tensor], None]
    rule: SparseChoice

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, L, D and V."""
        batch, heads, context, dim = self.key.shape
        return batch, heads, context, dim, self.value.shape[3]

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All of them, as plain tensors."""
        view = view_of(self.key, self.value)
        return (self.key, self.value) if view is None else view.dense(dtype)


@dataclass(frozen=True, eq=False)
class SplitKV:
    """A rank's part of the keys and values of a layer, [B,K,L',D] and [B,K,L',V], or their view.

    cache: which holds them, of `length` tokens of all ranks. gather: from a tensor of this rank to
    those of all, [N, ...].
    """

    own: tuple[Tensor, Tensor] | PagedKV | QuantKV
    cache: SplitCache
    length: int
    gather: Callable[[Tensor], Tensor]

    @property
    def key(self) -> Tensor:
        """Something that is where the keys are."""
        return self.own[0] if isinstance(self.own, tuple) else self.own.key

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, L, D and V, of all tokens."""
        if isinstance(self.own, tuple):
            key, value = self.own
            return key.shape[0], key.shape[1], self.length, key.shape[3], value.shape[3]
        batch, heads, _, dim, value_dim = self.own.shape
        return batch, heads, self.length, dim, value_dim

    @property
    def positions(self) -> Tensor:
        """Where the rank's keys are, [L'], on the CPU."""
        return self.cache.positions_of(self.length)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All of them, as plain tensors: every rank has to ask for them."""
        own = self.own if isinstance(self.own, tuple) else self.own.dense(dtype)
        return self._whole(own[0]), self._whole(own[1])

    def _whole(self, rows: Tensor) -> Tensor:
        shares = [replace(self.cache.share, rank=rank) for rank in range(self.cache.share.ranks)]
        counts = [share.held(self.length) for share in shares]
        padding = max(counts) - rows.shape[2]
        parts = self.gather(torch.nn.functional.pad(rows, (0, 0, 0, padding)))
        whole = rows.new_empty(*rows.shape[:2], self.length, rows.shape[3])
        for share, count, part in zip(shares, counts, parts, strict=True):
            at = share.positions(self.length).to(rows.device)
            whole.index_copy_(2, at, part[:, :, :count])
        return whole


Rows = PagedKV | QuantKV | WindowKV | SparseKV | SplitKV


class CachedRows(Tensor):
    """Keys or values of a view, with their shape [B,K,L,D] and no memory of their own.

    Our attention function takes the view out. Whatever else computes with them, stock attention or
    a module that expands latents, gets a dense copy.
    """

    kv: Rows
    is_value: bool

    @staticmethod
    def __new__(cls, kv: Rows, dtype: torch.dtype, *, is_value: bool) -> "CachedRows":
        if isinstance(kv, WindowKV):
            batch, heads, _, dim = kv.key.shape
            context, value_dim = kv.length, kv.value.shape[3]
        else:
            batch, heads, context, dim, value_dim = kv.shape
        size = (batch, heads, context, value_dim if is_value else dim)
        rows: CachedRows = Tensor._make_wrapper_subclass(
            cls, size, dtype=dtype, device=kv.key.device
        )
        rows.kv, rows.is_value = kv, is_value
        return rows

    def dense(self) -> Tensor:
        """A plain tensor, gathered or dequantised; contiguous, as PyTorch takes the rows to be.

        Raises:
            UnsupportedError: of a window with sinks, whose other tokens are gone.
        """
        if isinstance(self.kv, WindowKV):
            if self.kv.whole:
                return (self.kv.value if self.is_value else self.kv.key).contiguous()
            raise UnsupportedError(
                "a window cache of headwise holds no whole context: use it while the model is "
                "attached, or another cache"
            )
        return self.kv.dense(self.dtype)[int(self.is_value)].contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedRows":
        return CachedRows(copy.deepcopy(self.kv, memo), self.dtype, is_value=self.is_value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info and argument.alias_info.is_write:
                raise UnsupportedError(
                    f"{function} writes to keys or values that a cache of headwise holds in pages "
                    'or rounded: use cache="contiguous"'
                )
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, of a {type(self.kv).__name__})"


def rows_of(view: Rows, dtype: torch.dtype) -> tuple[CachedRows, CachedRows]:
    """The keys and the values of a view."""
    return CachedRows(view, dtype, is_value=False), CachedRows(view, dtype, is_value=True)


def view_of(key: Tensor, value: Tensor) -> Any:
    """The view that both are rows of; None for tensors."""
    if isinstance(key, CachedRows) and isinstance(value, CachedRows):
        return key.kv if key.kv is value.kv else None
    return None
