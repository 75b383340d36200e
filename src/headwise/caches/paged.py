"""A paged cache for one layer: sequences in pages of one pool, which they can share."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from headwise.caches.contiguous import are_like, grown_capacity
from headwise.caches.holders import alias
from headwise.caches.pages import Pages, Step, size_obstacle
from headwise.caches.pools import Pools
from headwise.caches.protocol import Cache, CacheKind, check_index, check_pair
from headwise.caches.rounding import check_bits, rounded
from headwise.errors import CapacityError, ShapeError
from headwise.ops import KV, Bits, PagedKV, QuantKV


class PagedCache(Cache):
    """Two tensors [B, heads, L, dim] side by side, in pages: keys and values, or MLA's pair.

    Example:
        >>> import torch, headwise
        >>> from headwise.caches import PagedCache
        >>> cache = PagedCache()
        >>> kv = cache.append(torch.randn(1, 3, 40, 64), torch.randn(1, 3, 40, 64))  # a prompt
        >>> cache.select(torch.zeros(16, dtype=torch.int64))  # 16 sequences that begin with it
        >>> cache.length, cache.nbytes == 40 * 2 * 3 * 64 * 4
        (40, True)
        >>> kv = cache.append(torch.randn(16, 3, 1, 64), torch.randn(16, 3, 1, 64))
        >>> headwise.attention(torch.randn(16, 9, 1, 64), kv=kv).shape
        torch.Size([16, 9, 1, 64])

    What sequences have in common is held once: `select`, `reorder` and `share` copy page tables,
    not pages. A page that others read too is copied before the first token is written into it.
    Where somebody still holds a view and an append would write over tokens that were dropped since,
    the pool is copied first.

    Args:
        page_size: tokens of a page, a power of two.
        capacity: tokens that the pool may hold at most, in whole pages; None lets it grow.
        bits: 8 or 4 round every token when it comes, as `QuantizedCache` does; None keeps them.

    Raises:
        ShapeError: a page size that is no power of two, a capacity below 1, or other bits.
    """

    gives = "view"

    def __init__(
        self, page_size: int = 64, capacity: int | None = None, bits: Bits | None = None
    ) -> None:
        if not isinstance(page_size, int) or page_size < 1 or page_size & (page_size - 1):
            raise ShapeError(f"page_size is {page_size!r}, expected a power of two")
        if capacity is not None and capacity < 1:
            raise ShapeError(f"capacity is {capacity!r}, expected at least 1 token, or None")
        if bits is not None:
            check_bits(bits)
        self.page_size = page_size
        self.capacity = capacity
        self.bits: Bits | None = bits
        self._pools: Pools | None = None
        self._pages = Pages(page_size)

    @classmethod
    @torch.inference_mode(mode=False)
    def over(
        cls,
        pools: Sequence[Tensor],
        table: Tensor,
        lengths: Sequence[int],
        *,
        capacity: int | None = None,
        bits: Bits | None = None,
    ) -> "PagedCache":
        """A cache over memory that exists: it holds what lies there, and appends to it in place.

        Example:
            >>> import torch
            >>> from headwise.caches import PagedCache
            >>> region = torch.zeros(6, 2, 3, 16, 64)  # 6 pages, and in each: 2 pools of 3 heads
            >>> pools = region[:, 0].transpose(0, 1), region[:, 1].transpose(0, 1)
            >>> table = torch.tensor([[4, 2]], dtype=torch.int32)
            >>> cache = PagedCache.over(pools, table, [20])  # 16 tokens in page 4, 4 in page 2
            >>> kv = cache.append(torch.ones(1, 3, 1, 64), torch.ones(1, 3, 1, 64))
            >>> region[2, 0, :, 4].sum()  # the token after those, in page 2
            tensor(192.)

        Pages that the table does not name are free, and so are the rows behind a sequence's last
        token. Where they are not enough the cache moves to pools of its own, as it does where a
        write would change a view; who holds another part of the same storage may have one.

        Args:
            pools: keys and values, [K, pages, page size, D] and [K, pages, page size, V], in any
                strides that keep D together. With `bits` four of them: integers and scales of keys,
                then of values, as `QuantKV` has them.
            table: [B, n] int32, the pages of each sequence in their order. It is copied.
            lengths: tokens of each sequence, at most n pages.
            capacity: as in `PagedCache`.
            bits: of the integers in the pools, 8 or 4; None where rows keep their dtype.

        Raises:
            ShapeError: tensors that do not fit one another, pages that do not exist, lengths that
                the table has no room for.
        """
        count = 2 if bits is None else 4
        if len(pools) != count or not all(map(_is_pool, pools)):
            shapes = [list(getattr(pool, "shape", ())) for pool in pools]
            raise ShapeError(
                f"pools have shapes {shapes}, expected {count} tensors [K, pages, page size, dim] "
                "whose last dim has a stride of 1"
            )
        batch = len(lengths)
        if table.ndim != 2 or len(table) != batch or min(lengths, default=0) < 0:
            raise ShapeError(
                f"table has shape {list(table.shape)} and lengths are {list(lengths)}, expected "
                "[B, n] and B numbers from 0"
            )
        cache = cls(pools[0].shape[2], capacity, bits)
        cache._pools = Pools([alias(pool) for pool in pools])
        cache._pages.table, cache._pages.lengths = table.clone(), list(lengths)
        view = cache.view
        assert view is not None
        view.check(pools[0])
        view.check_pages()
        cache._pages.add(pools[0].shape[1])
        cache._pages.use(cache._pages.table, cache._pages.lengths)
        cache._pages.dropped = False  # what no sequence holds may be written, as said
        return cache

    def __copy__(self) -> "PagedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if self._pools is not None:
            twin._pools = copy(self._pools)
            self._pages.dropped = True  # what the other appends lies there
        twin._pages = copy(self._pages)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # copied and pickled without spare pages, and without what else is in their memory
        state = dict(self.__dict__)
        if self._pools is not None:
            pages = copy(self._pages)
            state |= {"_pools": self._pools.first(pages.cut()), "_pages": pages}
        return state

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._pools = None
        self._pages.clear()

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self._pages.length

    @property
    def name(self) -> str:
        """As "paged:64", or "int8:64" where rows are rounded."""
        return f"{KIND.name if self.bits is None else f'int{self.bits}'}:{self.page_size}"

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        return None if self._pools is None else len(self._pages.lengths)

    @property
    def kept(self) -> tuple[str, ...]:
        """Of the two tensors, or of integers and scales."""
        both = "first", "first_scales", "second", "second_scales"
        return both[::2] if self.bits is None else both

    @property
    def starts(self) -> Sequence[int] | None:
        """The next position of each sequence where they differ."""
        lengths = self._pages.lengths
        return lengths if len(set(lengths)) > 1 else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self._pages.lengths)

    @property
    def view(self) -> KV | None:
        """What is held, a `PagedKV`, or a `QuantKV` of rounded rows; None before any append."""
        if self._pools is None:
            return None
        pages, length = self._pages, self.length
        tensors = [pool.transpose(0, 1) for pool in self._pools.tensors]
        ragged = min(pages.lengths, default=0) != length
        where: dict[str, Any] = {
            "page_table": pages.table[:, : pages.of(length)],
            "context": length,
            "lengths": torch.tensor(pages.lengths, device=tensors[0].device) if ragged else None,
        }
        if self.bits is None:
            return PagedKV(key=tensors[0], value=tensors[1], **where)
        key, key_scales, value, value_scales = tensors
        return QuantKV(
            key=key,
            key_scales=key_scales,
            value=value,
            value_scales=value_scales,
            bits=self.bits,
            **where,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the held tokens take, those that sequences share once."""
        return 0 if self._pools is None else self._pages.tokens * self._pools.bytes_per_token

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""
        if self._pools is None:
            return 0
        return len(self._pages.users) * self.page_size * self._pools.bytes_per_token

    def append(self, first: Tensor, second: Tensor, counts: Sequence[int] | None = None) -> KV:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim'].

        Args:
            first, second: as said; the first three dims of both must agree.
            counts: how many of the S tokens each sequence gets, the last ones (padding is on the
                left); None for all.

        Returns:
            A view of all, for `attention(query, kv=view)`.

        Raises:
            ShapeError: the tokens do not fit what the cache holds.
            UnsupportedError: the tokens need gradients.
            CapacityError: the pool cannot hold them; the cache is unchanged.
        """
        check_pair(first, second)
        self._check_fits(first, second)
        batch, _, length, _ = first.shape
        added = [length] * batch if counts is None else list(counts)
        if len(added) != batch or not all(0 <= count <= length for count in added):
            raise ShapeError(f"counts are {added}, expected {batch} of 0 to {length}")
        tokens: tuple[Tensor, ...] = (first, second)
        if self.bits is not None:
            tokens = (*rounded(first, self.bits), *rounded(second, self.bits))
        step = self._pages.step(added)
        if any(added) or self._pools is None:
            self._make_room(step, tokens)
            self._pages.dropped = False
        assert self._pools is not None
        for page, fresh, rows in self._pages.take(step, first.device):
            self._pools.copy_rows(page, fresh, rows)
        if length == 1 and batch == 1 and added[0]:
            index, row = divmod(step.before[0], self.page_size)
            self._pools.write_one(tokens, int(self._pages.table[0, index]), row)
        elif any(added):
            self._pools.write(tokens, *self._pages.places(step, length))
        view = self.view
        assert view is not None
        return view

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence; shorter ones stay as they are.

        Raises:
            ShapeError: `length` is negative or more than is held.
        """
        self._pages.crop(length)

    def room(
        self, batch: int, heads: int, count: int, like: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Pages [pages, heads, page size, dim], and the table, if `count` tokens can be written.

        They can where the only sequence has room for them in a page of its own; else an append has
        more to do. Who has written them says so by `wrote`.
        """
        pages = self._pages
        if self._pools is None or self.bits is not None or not pages.has_room(count):
            return None
        first, second = self._pools.tensors
        if not are_like(first, second, like) or (batch, heads) != (1, first.shape[0]):
            return None
        return first.transpose(0, 1), second.transpose(0, 1), pages.table

    def wrote(self, count: int) -> None:
        """Hold `count` tokens more, which were written into the pages of `room`."""
        self._pages.lengths[0] += count

    def rows(self, sequence: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """Tokens `begin` to `end` of a sequence, [heads, S, dim], gathered from their pages."""
        assert self._pools is not None
        assert 0 <= begin <= end <= self._pages.lengths[sequence]
        size = self.page_size
        pages = self._pages.table[sequence, begin // size : self._pages.of(end)].long()
        rows = (pool[:, pages].flatten(1, 2) for pool in self._pools.tensors)
        return tuple(each[:, begin % size :][:, : end - begin] for each in rows)

    @torch.inference_mode(mode=False)
    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Sequences that are named twice share their pages.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
        """
        check_index(index)
        if self._pools is not None:
            self._pages.select(index)

    @torch.inference_mode(mode=False)
    def share(self, source: int, length: int, targets: Sequence[int]) -> None:
        """Make the sequences `targets` begin with, and hold only, the first tokens of `source`.

        The source stays as it is, also where it is among the targets.

        Raises:
            ShapeError: a sequence that is not held, or more tokens than `source` has.
        """
        self._pages.share(source, length, targets)

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        with torch.inference_mode(False):
            self._pools = self._pools and self._pools.to(device)
            self._pages.table = self._pages.table.to(device)

    def _new_pools(self, tokens: tuple[Tensor, ...]) -> Pools:
        return Pools.empty(tokens, self.page_size)

    def _check_fits(self, first: Tensor, second: Tensor) -> None:
        """Raise unless the tokens fit the pools; those of integers take any dtype."""
        if self._pools is None:
            return
        rows = self._pools.tensors[:: len(self._pools.tensors) // 2]
        for pool, tokens in zip(rows, (first, second), strict=True):
            dim = pool.shape[3] if self.bits is None else pool.shape[3] * 8 // self.bits
            dtype = pool.dtype if self.bits is None else tokens.dtype
            expected = [len(self._pages.lengths), pool.shape[0], dim]
            sizes = [tokens.shape[0], tokens.shape[1], tokens.shape[3]]
            if sizes != expected or tokens.dtype != dtype or tokens.device != pool.device:
                raise ShapeError(
                    f"tokens have batch, heads, dim {sizes}, {tokens.dtype} on {tokens.device}; "
                    f"the cache holds {expected}, {dtype} on {pool.device}"
                )

    def _make_room(self, step: Step, tokens: tuple[Tensor, ...]) -> None:
        """Have as many free pages as a step takes, or raise `CapacityError`.

        Where rows are to be written that whoever holds the pools may look at, they are new ones.
        """
        pages, overwrites = self._pages, self._pages.dropped or bool(step.copied)
        held, missing = len(pages.users), step.pages - len(pages.free)
        pools = self._pools
        if pools is not None and missing <= 0:
            if not (overwrites and pools.viewed):
                return
            # room that was never used is not moved: a region may have much
            with torch.inference_mode(False):
                pages = copy(pages)
            held = pages.cut()
            missing = max(0, step.pages - len(pages.free))
        if pools is None:
            pools = self._new_pools(tokens)
        per_token = pools.bytes_per_token
        wanted = pages.of(grown_capacity((held + missing) * self.page_size, per_token))
        if self.capacity is not None:
            most, per_page = pages.of(self.capacity), self.page_size * per_token
            if held + missing > most:
                raise CapacityError(
                    f"the pool of {most} pages ({most * per_page:,} bytes) has "
                    f"{most - held + len(pages.free)} free, and {step.pages} are needed "
                    f"({step.pages * per_page:,} bytes)"
                )
            wanted = most if self._pools is None else min(wanted, most)
        # normal tensors even under inference mode, so that appends go on working outside it
        with torch.inference_mode(False), torch.no_grad():
            self._pools = pools.to_fit(wanted, held, wanted if self.capacity else held + missing)
        pages.add(self._pools.tensors[0].shape[1] - held)
        self._pages = pages


def _is_pool(pool: Any) -> bool:
    """Whether it is a tensor [K, pages, page size, dim] with every row together."""
    four = isinstance(pool, Tensor) and pool.ndim == 4
    return four and (pool.stride(3) == 1 or pool.shape[3] <= 1)


KIND = CacheKind(
    "paged",
    ("paged", "paged:PAGE_SIZE"),
    lambda choice: PagedCache(choice.size),
    lambda choice: f"paged, {choice.size} tokens per page",
    size=64,
    obstacle=size_obstacle,
    layout=lambda size: "paged",
)
