"""Views of caches whose keys and values are not two tensors: pages of a pool, quantised rows.

`attention(query, kv=view)` and `latent_attention(..., kv=view)` take them in place of key and
value, or of latent and rope key, which they hold under the same two names.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.integers.rounding import INT4_GROUP, Bits, dequantize


class _Pages:
    """What views have in common whose tensors are pools, [pages, K, page size, ...]."""

    __slots__ = ()
    key: Tensor
    page_table: Tensor | None
    context: int
    lengths: Tensor | None

    def check_pages(self) -> None:
        """Raise `ShapeError` where the page table names a page that does not exist."""
        if self.page_table is not None:
            self._check_pages(self._table())

    def _check_table(self, device: torch.device) -> None:
        """Raise `ShapeError` unless the page table and `context` fit the pools."""
        _require("kv.page_table", self.page_table, 2, torch.int32, device)
        assert self.page_table is not None
        size = self.key.shape[2]
        if size < 1 or size & (size - 1):
            raise ShapeError(f"pages hold {size} tokens, expected a power of two")
        room = self.page_table.shape[1] * size
        if not isinstance(self.context, int) or not 0 <= self.context <= room:
            raise ShapeError(
                f"kv.context is {self.context!r}, expected 0 to {room}, what a row of the page "
                "table has room for"
            )

    def _check_pages(self, table: Tensor) -> None:
        low, high = (int(table.min()), int(table.max())) if table.numel() else (0, 0)
        if table.numel() and (low < 0 or high >= len(self.key)):
            raise ShapeError(
                f"kv.page_table names pages {low} to {high}, expected 0 to {len(self.key) - 1}, "
                "those of the pool"
            )

    def _table(self) -> Tensor:
        """The pages in use, [B, n]; page 0 behind a sequence's last one."""
        assert self.page_table is not None
        size = self.key.shape[2]
        table = self.page_table[:, : -(-self.context // size)].long()
        if self.lengths is None:
            return table
        # what lies behind a sequence's last page may name no page
        first = torch.arange(table.shape[1], device=table.device) * size
        return table.masked_fill(first >= self.lengths[:, None], 0)

    def _rows(self, pool: Tensor) -> Tensor:
        """[B, K, L, ...], gathered from the pages, with zeros past a length; or what is none."""
        if self.page_table is None:
            return pool
        table, past = self._table(), None
        if self.lengths is not None:
            position = torch.arange(self.context, device=pool.device)
            past = position >= self.lengths[:, None]
        # on other devices reading the values would stall the queue; the C++ kernels look themselves
        if pool.device.type == "cpu":
            self._check_pages(table)
        rows = pool[table].transpose(1, 2).flatten(2, 3)[:, :, : self.context]
        return rows if past is None else rows.masked_fill(past[:, None, :, None], 0)


@dataclass(kw_only=True, slots=True, eq=False, repr=False)
class PagedKV(_Pages):
    """Keys and values in pages of a pool.

    Example:
        >>> import torch, headwise
        >>> kv = headwise.PagedKV(
        ...     key=torch.randn(8, 2, 16, 64),  # 8 pages of 16 tokens, 2 kv heads
        ...     value=torch.randn(8, 2, 16, 64),
        ...     page_table=torch.tensor([[5, 0], [3, 2]], dtype=torch.int32),
        ...     context=20,
        ... )
        >>> headwise.attention(torch.randn(2, 4, 1, 64), kv=kv).shape
        torch.Size([2, 4, 1, 64])

    Args:
        key: [pages, K, page size, D], in any strides that keep D together; the page size is a power
            of two.
        value: [pages, K, page size, V].
        page_table: [B, n] int32, the pages of each sequence in their order; entries behind its last
            page may be anything.
        context: L, the tokens of the longest sequence, at most n * page size.
        lengths: [B] int, the tokens of each sequence; None where all have `context`.
    """

    key: Tensor
    value: Tensor
    page_table: Tensor
    context: int
    lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, L, D and V."""
        _, heads, _, dim = self.key.shape
        return self.page_table.shape[0], heads, self.context, dim, self.value.shape[3]

    @property
    def layout(self) -> str:
        """How a `Problem` names it."""
        return "paged"

    def __repr__(self) -> str:
        return _described(self)

    def exchanged(self) -> "PagedKV":
        """The same pools with key and value in each other's place."""
        return replace(self, key=self.value, value=self.key)

    def keys_alone(self) -> "PagedKV":
        """The same pool of keys, for values too."""
        return replace(self, value=self.key)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies [B,K,L,D] and [B,K,L,V], gathered from the pages; zeros past a length."""
        return self._rows(self.key).to(dtype), self._rows(self.value).to(dtype)

    def check(self, query: Tensor) -> None:
        """Raise `ShapeError` unless the tensors fit one another and the query."""
        for name, pool in (("kv.key", self.key), ("kv.value", self.value)):
            _require(name, pool, 4, query.dtype, query.device)
        if self.value.shape[:3] != self.key.shape[:3]:
            raise ShapeError(
                f"kv.value has shape {list(self.value.shape)}, expected [pages, K, page size, V] "
                f"with the same first three as kv.key {list(self.key.shape)}"
            )
        self._check_table(query.device)


@dataclass(kw_only=True, slots=True, eq=False, repr=False)
class QuantKV(_Pages):
    """Keys and values as integers with scales, as `QuantizedCache` holds them, or in pages.

    Example:
        >>> import torch, headwise
        >>> from headwise.caches import QuantizedCache
        >>> cache = QuantizedCache(bits=8)
        >>> kv = cache.append(torch.randn(1, 2, 50, 64), torch.randn(1, 2, 50, 64))
        >>> kv.key.dtype, kv.key_scales.shape
        (torch.int8, torch.Size([1, 2, 50, 1]))
        >>> headwise.attention(torch.randn(1, 4, 1, 64), kv=kv).shape
        torch.Size([1, 4, 1, 64])

    Args:
        key: in 8 bits int8 [B, K, L, D]; in 4 bits uint8 [B, K, L, D/2].
        key_scales: float32, in 8 bits [B, K, L, 1]; in 4 bits [B, K, L, ceil(D/32)].
        value: as key, of V.
        value_scales: as key_scales, of V.
        bits: 8 or 4. In 4 bits the rows are rotated (`headwise.ops.rotate`).
        page_table: [B, n] int32, as in `PagedKV`: then the four tensors are pages of pools, and
            begin with [pages, K, page size] in place of [B, K, L]. None where they are not.
        context: L, the tokens of the longest sequence; 0 without a page table.
        lengths: [B] int, the tokens of each sequence; None where all have L. For pages alone.
    """

    key: Tensor
    key_scales: Tensor
    value: Tensor
    value_scales: Tensor
    bits: Bits
    page_table: Tensor | None = None
    context: int = 0
    lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, L, D and V."""
        batch, heads, context, size = self.key.shape
        if self.page_table is not None:
            batch, context = self.page_table.shape[0], self.context
        return batch, heads, context, size * 8 // self.bits, self.value.shape[3] * 8 // self.bits

    @property
    def layout(self) -> str:
        """How a `Problem` names it."""
        return f"int{self.bits}" if self.page_table is None else f"paged int{self.bits}"

    def __repr__(self) -> str:
        return _described(self)

    def exchanged(self) -> "QuantKV":
        """The same rows with key and value in each other's place."""
        return replace(
            self,
            key=self.value,
            key_scales=self.value_scales,
            value=self.key,
            value_scales=self.key_scales,
        )

    def keys_alone(self) -> "QuantKV":
        """The same keys, for values too."""
        return replace(self, value=self.key, value_scales=self.key_scales)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B,K,L,D] and [B,K,L,V], dequantised; zeros past a length."""
        key, key_scales, value, value_scales = map(
            self._rows, (self.key, self.key_scales, self.value, self.value_scales)
        )
        key = dequantize(key, key_scales, self.bits)
        return key.to(dtype), dequantize(value, value_scales, self.bits).to(dtype)

    def check(self, query: Tensor) -> None:
        """Raise `ShapeError` unless the tensors fit one another and the query's device."""
        if self.bits not in (4, 8):
            raise ShapeError(f"kv.bits is {self.bits!r}, expected 4 or 8")
        integers = torch.int8 if self.bits == 8 else torch.uint8
        for name in ("key", "value"):
            rows, scales = getattr(self, name), getattr(self, f"{name}_scales")
            _require(f"kv.{name}", rows, 4, integers, query.device)
            _require(f"kv.{name}_scales", scales, 4, torch.float32, query.device)
            groups = 1 if self.bits == 8 else -(-2 * rows.shape[3] // INT4_GROUP)
            expected = [*self.key.shape[:3], groups]
            if list(scales.shape) != expected or rows.shape[:3] != self.key.shape[:3]:
                raise ShapeError(
                    f"kv.{name} has shape {list(rows.shape)} and its scales {list(scales.shape)}, "
                    f"expected {[*self.key.shape[:3], 'bytes']} and {expected}"
                )
        if self.page_table is not None:
            self._check_table(query.device)
        elif self.context or self.lengths is not None:
            raise ShapeError("kv.context and kv.lengths are for pages: give a kv.page_table, too")


KV = PagedKV | QuantKV


def _described(view: KV) -> str:
    batch, heads, context, dim, value_dim = view.shape
    return f"{type(view).__name__}(B={batch}, K={heads}, L={context}, D={dim}, V={value_dim})"


def _require(name: str, tensor: Any, ndim: int, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.ndim != ndim or tensor.dtype != dtype or tensor.device != device:
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}, "
            f"expected {ndim} dims, {dtype} on {device}"
        )
