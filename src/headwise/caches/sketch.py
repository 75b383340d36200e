"""A sketch of the keys that a cache holds: the same keys in 4 bits, to choose among them."""

from copy import copy

import torch
from torch import Tensor

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.paged import PagedCache
from headwise.caches.protocol import Cache
from headwise.ops import Bits, PagedKV, QuantKV, dequantize, keys_alone, means_of, quantize

# Values of which one sum is kept.
_BLOCK = 256


class Sketch:
    """Keys in 4 bits beside the cache that they are of, read by `headwise.ops.choose_keys`.

    And sums of values, of 256 tokens each, for the mean that what is not chosen counts by.

    Example:
        >>> import torch
        >>> from headwise.caches import ContiguousCache, Sketch
        >>> cache, sketch = ContiguousCache(), Sketch()
        >>> key, value = cache.append(torch.randn(1, 2, 90, 64), torch.randn(1, 2, 90, 64))
        >>> sketch.view(cache)
        QuantKV(B=1, K=2, L=90, D=64, V=64)
        >>> sketch.nbytes  # 32 bytes and two scales of 4 per key
        7200

    It catches up when it is asked for: what the cache has read since is rounded then, and a cache
    that nobody asks about has none. Of a paged cache it is in pages too, which sequences share. A
    cache of 4 bits is its own. What is done to the cache (`crop`, `select`, ...) is to be done to
    its sketch as well.
    """

    def __init__(self) -> None:
        self._rows: ContiguousCache | PagedCache | None = None
        # [B, heads, n + 1, dim], float32: of the first 0, 256, 512, ... values
        self._sums: Tensor | None = None

    def __copy__(self) -> "Sketch":
        twin = Sketch()
        twin._rows, twin._sums = copy(self._rows), self._sums
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, beside the cache."""
        sums = 0 if self._sums is None else self._sums.nbytes
        return sums + (0 if self._rows is None else self._rows.nbytes)

    def view(self, cache: Cache, fresh: Tensor | None = None) -> QuantKV:
        """The sketch of all that the cache holds, as a view without values.

        Args:
            cache: one that holds every token, its sequences of one length.
            fresh: the keys that were appended last, [B, heads, S, dim], which spares reading them.
        """
        own = getattr(cache, "view", None)
        if isinstance(own, QuantKV) and own.bits == 4:
            return own.keys_alone()
        if self._rows is None:
            self._rows = ContiguousCache()
            if isinstance(cache, PagedCache):
                self._rows = PagedCache(cache.page_size)
        rows = self._rows
        if rows.length > cache.length:
            rows.crop(cache.length)
        if rows.length < cache.length or rows.batch is None:
            keys = fresh
            if keys is None or isinstance(own, QuantKV) or not _completes(rows, keys, cache):
                keys = held_rows(cache, 0, rows.length, cache.length)
            rows.append(*quantize(keys, 4))
        if isinstance(rows, PagedCache):
            view = rows.view
            assert isinstance(view, PagedKV)
            return _in_pages(view)
        integers, scales = rows.first, rows.second
        assert integers is not None
        assert scales is not None
        return keys_alone(integers, scales)

    def sums(self, cache: Cache) -> tuple[Tensor, int]:
        """Sums of the first values of the cache, float32 [B, heads, dim], and of how many."""
        whole, sums = cache.length // _BLOCK, self._sums
        done = 0 if sums is None else sums.shape[2] - 1
        if sums is None or done < whole:
            values = held_rows(cache, 1, done * _BLOCK, whole * _BLOCK).float()
            added = values.unflatten(2, (whole - done, _BLOCK)).sum(dim=3).cumsum(dim=2)
            if sums is None:
                sums = values.new_zeros(*values.shape[:2], 1, values.shape[3])
            sums = self._sums = torch.cat([sums, sums[:, :, -1:] + added], dim=2)
        return sums[:, :, whole].contiguous(), whole * _BLOCK

    def means(self, cache: Cache, queries: int) -> Tensor:
        """The mean of all values up to each of the last queries, float32 [B, heads, S, dim]."""
        sums, summed = self.sums(cache)
        if summed > cache.length - queries:  # what the first query may not see is among them
            assert self._sums is not None
            summed -= _BLOCK
            sums = self._sums[:, :, summed // _BLOCK]
        return means_of(held_rows(cache, 1, summed, cache.length), queries, sums, summed)

    def room(
        self, cache: Cache, batch: int, heads: int, count: int
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Integers, scales and page table, if `count` keys can be written behind the cache's last.

        As `ContiguousCache.room`; None too where it has to catch up first.
        """
        rows = self._rows
        if rows is None or rows.length != cache.length:
            return None
        return rows.room(batch, heads, count, None)

    def wrote(self, count: int) -> None:
        """Hold `count` keys more, which were written into what `room` gave."""
        assert self._rows is not None
        self._rows.wrote(count)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, of those that it has."""
        if self._sums is not None:
            self._sums = self._sums[:, :, : length // _BLOCK + 1]
        if self._rows is not None and length < self._rows.length:
            self._rows.crop(length)

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was, as `Cache.select`."""
        if self._sums is not None:
            self._sums = self._sums.index_select(0, index.to(self._sums.device))
        if self._rows is not None:
            self._rows.select(index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._rows = self._sums = None

    def to(self, device: torch.device | str) -> None:
        """Move it to `device`."""
        if self._sums is not None:
            self._sums = self._sums.to(device)
        if self._rows is not None:
            self._rows.to(device)


class SketchedCache(ContiguousCache):
    """A `ContiguousCache` with a sketch of its keys, for a layer of `headwise.nn` that chooses.

    >>> cache = SketchedCache()
    >>> key, value = cache.append(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    >>> cache.sketch
    QuantKV(B=1, K=2, L=9, D=16, V=16)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sketch = Sketch()

    def __copy__(self) -> "SketchedCache":
        twin = super().__copy__()
        assert isinstance(twin, SketchedCache)
        twin._sketch = copy(self._sketch)
        return twin

    @property
    def sketch(self) -> QuantKV:
        """The keys that it holds, in 4 bits."""
        return self._sketch.view(self)

    def means(self, queries: int) -> Tensor:
        """As `Sketch.means`."""
        return self._sketch.means(self, queries)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        super().crop(length)
        self._sketch.crop(length)

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was."""
        super().select(index)
        self._sketch.select(index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self._sketch.reset()

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        super().to(device)
        self._sketch.to(device)


def _completes(rows: Cache, fresh: Tensor, cache: Cache) -> bool:
    return int(rows.length) + fresh.shape[2] == int(cache.length)


def held_rows(cache: Cache, which: int, begin: int, end: int) -> Tensor:
    """The keys (0) or the values (1) of tokens `begin` to `end`, [B, heads, S, dim]."""
    assert cache.batch is not None
    each = 2 if "first_scales" in cache.kept else 1
    parts = [cache.rows(sequence, begin, end) for sequence in range(cache.batch)]
    rows = torch.stack([part[each * which] for part in parts])
    if each == 1:
        return rows
    bits: Bits = 8 if rows.dtype == torch.int8 else 4
    return dequantize(rows, torch.stack([part[2 * which + 1] for part in parts]), bits)


def _in_pages(view: PagedKV) -> QuantKV:
    return QuantKV(
        key=view.key,
        key_scales=view.value,
        value=view.key,
        value_scales=view.value,
        bits=4,
        page_table=view.page_table,
        context=view.context,
    )
