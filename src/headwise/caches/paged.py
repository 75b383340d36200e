"""A paged cache for one layer: sequences in pages of one pool, which they can share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.caches.contiguous import grown_capacity
from headwise.caches.holders import alias, others_hold
from headwise.caches.large_pages import advise_large_pages
from headwise.caches.protocol import Cache, CacheKind, check_crop, check_index, check_pair
from headwise.errors import CapacityError, ShapeError
from headwise.ops import PagedKV


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
    Pages that no sequence uses any more are free for others. Where somebody still holds a view and
    an append would write over tokens that were dropped since, the pool is copied first.

    Args:
        page_size: tokens of a page, a power of two.
        capacity: tokens that the pool may hold at most, in whole pages; None lets it grow.

    Raises:
        ShapeError: a page size that is no power of two, or a capacity below 1.
    """

    gives = "view"

    def __init__(self, page_size: int = 64, capacity: int | None = None) -> None:
        if not isinstance(page_size, int) or page_size < 1 or page_size & (page_size - 1):
            raise ShapeError(f"page_size is {page_size!r}, expected a power of two")
        if capacity is not None and capacity < 1:
            raise ShapeError(f"capacity is {capacity!r}, expected at least 1 token, or None")
        self.page_size = page_size
        self.capacity = capacity
        self._pools: tuple[Tensor, Tensor] | None = None  # [K, pages, page size, dim]
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._lengths: list[int] = []
        self._users: list[int] = []  # of each page
        self._free: list[int] = []  # the next to take last
        self._shared = False  # whether some last page may have other users
        self._dropped = False  # whether views may reach rows that no sequence holds

    def __copy__(self) -> "PagedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._table = self._table.clone()
        twin._lengths, twin._users, twin._free = self._lengths[:], self._users[:], self._free[:]
        if self._pools is not None:
            twin._pools = alias(self._pools[0]), alias(self._pools[1])
            self._dropped = twin._dropped = True  # what the other appends lies there
        return twin

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._pools = None
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._lengths, self._users, self._free, self._shared = [], [], [], False
        self._dropped = False

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths, default=0)

    @property
    def name(self) -> str:
        """As "paged:64"."""
        return f"{KIND.name}:{self.page_size}"

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        return None if self._pools is None else len(self._lengths)

    @property
    def starts(self) -> Sequence[int] | None:
        """The next position of each sequence where they differ."""
        return self._lengths if len(set(self._lengths)) > 1 else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def view(self) -> PagedKV | None:
        """What is held; None before any append."""
        if self._pools is None:
            return None
        first, second = self._pools
        length = self.length
        ragged = min(self._lengths, default=0) != length
        return PagedKV(
            key=first.transpose(0, 1),
            value=second.transpose(0, 1),
            page_table=self._table[:, : self._pages_of(length)],
            context=length,
            lengths=torch.tensor(self._lengths, device=first.device) if ragged else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the held tokens take, those that sequences share once."""
        tokens: dict[int, int] = {}
        for row, length in zip(self._table.tolist(), self._lengths, strict=True):
            for index in range(self._pages_of(length)):
                inside = min(self.page_size, length - index * self.page_size)
                tokens[row[index]] = max(inside, tokens.get(row[index], 0))
        return sum(tokens.values()) * self._bytes_per_token()

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""
        return len(self._users) * self.page_size * self._bytes_per_token()

    def append(self, first: Tensor, second: Tensor, counts: Sequence[int] | None = None) -> PagedKV:
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
        batch, _, length, _ = first.shape
        if self._pools is not None:
            self._check_fits(first, second)
        added = [length] * batch if counts is None else list(counts)
        if len(added) != batch or not all(0 <= count <= length for count in added):
            raise ShapeError(f"counts are {added}, expected {batch} of 0 to {length}")
        before = self._lengths if self._pools is not None else [0] * batch
        copied = self._pages_to_copy(before, added) if self._shared else []
        ends = [old + count for old, count in zip(before, added, strict=True)]
        new = [self._pages_of(end) - self._pages_of(old) for end, old in zip(ends, before)]
        if any(added) or self._pools is None:
            overwrites = self._dropped or bool(copied)
            self._make_room(len(copied) + sum(new), first, second, overwrites)
            self._dropped = False
        self._lengths = ends
        self._make_table(first.device, writes=bool(copied) or any(new))
        for sequence in copied:
            self._copy_last_page(sequence, before[sequence])
        for sequence, pages in enumerate(new):
            if pages:
                taken = [self._take() for _ in range(pages)]
                begin = self._pages_of(before[sequence])
                self._table[sequence, begin : begin + pages] = torch.tensor(taken)
        self._write(first, second, before, added)
        view = self.view
        assert view is not None
        return view

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence; shorter ones stay as they are.

        Raises:
            ShapeError: `length` is negative or more than is held.
        """
        check_crop(length, self.length)
        self._use(self._table, [min(length, old) for old in self._lengths])

    @torch.inference_mode(mode=False)
    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Sequences that are named twice share their pages.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
        """
        check_index(index)
        if self._pools is None:
            return
        chosen = index.tolist()
        if any(not 0 <= sequence < len(self._lengths) for sequence in chosen):
            raise ShapeError(
                f"index runs from {min(chosen)} to {max(chosen)}, expected 0 to "
                f"{len(self._lengths) - 1}, those held"
            )
        table = self._table.index_select(0, index.to(self._table.device))
        self._use(table, [self._lengths[sequence] for sequence in chosen])

    @torch.inference_mode(mode=False)
    def share(self, source: int, length: int, targets: Sequence[int]) -> None:
        """Make the sequences `targets` begin with, and hold only, the first tokens of `source`.

        The source stays as it is, also where it is among the targets.

        Raises:
            ShapeError: a sequence that is not held, or more tokens than `source` has.
        """
        batch = len(self._lengths)
        if any(not 0 <= sequence < batch for sequence in (source, *targets)):
            raise ShapeError(
                f"share from {source} to {list(targets)}: sequences are 0 to {batch - 1}"
            )
        if not 0 <= length <= self._lengths[source]:
            raise ShapeError(
                f"share {length} tokens of sequence {source}, which has {self._lengths[source]}"
            )
        table, lengths = self._table.clone(), list(self._lengths)
        others = [sequence for sequence in targets if sequence != source]
        table[others] = self._table[source]
        for sequence in others:
            lengths[sequence] = length
        self._use(table, lengths)

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        if self._pools is not None:
            with torch.inference_mode(False):
                first, second = self._pools
                self._pools = (first.to(device), second.to(device))
                self._table = self._table.to(device)

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _bytes_per_token(self) -> int:
        if self._pools is None:
            return 0
        return sum(pool.shape[0] * pool.shape[3] * pool.element_size() for pool in self._pools)

    def _check_fits(self, first: Tensor, second: Tensor) -> None:
        assert self._pools is not None
        for pool, tokens in zip(self._pools, (first, second), strict=True):
            expected = [len(self._lengths), pool.shape[0], pool.shape[3]]
            sizes = [tokens.shape[0], tokens.shape[1], tokens.shape[3]]
            if sizes != expected or tokens.dtype != pool.dtype or tokens.device != pool.device:
                raise ShapeError(
                    f"tokens have batch, heads, dim {sizes}, {tokens.dtype} on {tokens.device}; "
                    f"the cache holds {expected}, {pool.dtype} on {pool.device}"
                )

    def _use(self, table: Tensor, lengths: list[int]) -> None:
        """Take these pages, count their users, and free the rest."""
        index = torch.arange(table.shape[1], device=table.device)
        used = torch.tensor([self._pages_of(length) for length in lengths], device=table.device)
        pages = table[index < used[:, None]]
        users = torch.bincount(pages, minlength=len(self._users))
        self._table, self._lengths = table, lengths
        self._dropped = True
        self._users = users.tolist()
        self._free = (users == 0).nonzero().flatten().flip(0).tolist()
        self._shared = bool((users > 1).any())

    def _pages_to_copy(self, before: list[int], added: list[int]) -> list[int]:
        """The sequences whose last page gets tokens and has other users that are to keep it."""
        left: dict[int, int] = {}
        sequences = []
        for sequence, (length, count) in enumerate(zip(before, added, strict=True)):
            if count and length % self.page_size:
                page = int(self._table[sequence, length // self.page_size])
                users = left.get(page, self._users[page])
                if users > 1:
                    sequences.append(sequence)
                    left[page] = users - 1
        return sequences

    def _copy_last_page(self, sequence: int, length: int) -> None:
        assert self._pools is not None
        index, rows = length // self.page_size, length % self.page_size
        page, fresh = int(self._table[sequence, index]), self._take()
        for pool in self._pools:
            pool.data[:, fresh, :rows].copy_(pool[:, page, :rows])
        self._users[page] -= 1
        self._table[sequence, index] = fresh

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _make_table(self, device: torch.device, *, writes: bool) -> None:
        """Have room in the table for what `_lengths` says, and nobody else who sees it written."""
        pages, (rows, width) = self._pages_of(self.length), self._table.shape
        if pages > width:
            width = max(pages, width + width // 2, 8)
        elif rows == len(self._lengths) and not (writes and others_hold(self._table)):
            return
        # normal tensors even under inference mode, so that appends go on working outside it
        with torch.inference_mode(False):
            table = torch.zeros(len(self._lengths), width, dtype=torch.int32, device=device)
            table[:rows, : self._table.shape[1]] = self._table
        self._table = table

    def _make_room(self, pages: int, first: Tensor, second: Tensor, overwrites: bool) -> None:
        """Have `pages` free pages, or raise `CapacityError`.

        overwrites: rows are to be written that whoever holds the pools may look at; then new ones.
        """
        pool, missing = len(self._users), pages - len(self._free)
        fits = missing <= 0 and self._pools is not None
        if fits and not (overwrites and any(map(others_hold, self._pools or ()))):
            return
        per_token = first.shape[1] * sum(t.shape[3] * t.element_size() for t in (first, second))
        per_page = self.page_size * per_token
        wanted = self._pages_of(grown_capacity((pool + missing) * self.page_size, per_token))
        if fits:
            wanted = pool
        elif self.capacity is not None:
            most = self._pages_of(self.capacity)
            if pool + missing > most:
                raise CapacityError(
                    f"the pool of {most} pages ({most * per_page:,} bytes) has "
                    f"{most - pool + len(self._free)} free, and {pages} are needed "
                    f"({pages * per_page:,} bytes)"
                )
            wanted = most if self._pools is None else min(wanted, most)
        with torch.inference_mode(False), torch.no_grad():
            try:
                grown = tuple(
                    tokens.new_empty(tokens.shape[1], wanted, self.page_size, tokens.shape[3])
                    for tokens in (first, second)
                )
            except (RuntimeError, MemoryError) as error:
                reason = str(error).partition("\n")[0]
                raise CapacityError(
                    f"the pool needs {wanted * per_page:,} bytes for {wanted:,} pages of a layer, "
                    f"beside the {self.reserved_bytes:,} that it has: {reason}"
                ) from error
            for fresh in grown:
                advise_large_pages(fresh)
            if self._pools is not None:
                for fresh, old in zip(grown, self._pools, strict=True):
                    fresh[:, :pool].copy_(old)
            self._pools = (grown[0], grown[1])
        self._users += [0] * (wanted - pool)
        self._free = [*range(wanted - 1, pool - 1, -1), *self._free]

    def _write(self, first: Tensor, second: Tensor, before: list[int], added: list[int]) -> None:
        assert self._pools is not None
        batch, heads, length, _ = first.shape
        if not any(added):
            return
        # .data: for autograd, views that are operands in a graph have not changed
        pools = [pool.data for pool in self._pools]
        if length == 1 and batch == 1 and added[0]:
            page = int(self._table[0, before[0] // self.page_size])
            for pool, tokens in zip(pools, (first, second), strict=True):
                pool[:, page, before[0] % self.page_size].copy_(tokens[0, :, 0])
            return
        device = self._table.device
        start = torch.tensor(before, device=device).unsqueeze(1)
        count = torch.tensor(added, device=device).unsqueeze(1)
        step = torch.arange(length, device=device)
        position = start + step - (length - count)  # [B, S]; before `start` where it is padding
        pages = self._table.gather(1, (position.clamp(min=0) // self.page_size)).long()
        slots = pages * self.page_size + position % self.page_size
        real = (step >= length - count).flatten()
        whole = min(added, default=0) == length
        for pool, tokens in zip(pools, (first, second), strict=True):
            rows = tokens.transpose(0, 1).reshape(heads, batch * length, tokens.shape[3])
            flat = pool.flatten(1, 2)
            if whole:
                flat.index_copy_(1, slots.flatten(), rows)
            else:
                flat.index_copy_(1, slots.flatten()[real], rows[:, real])


def _obstacle(size: int) -> str | None:
    whole = size >= 1 and not size & (size - 1)
    return None if whole else ": pages hold a power of two of tokens, as paged:16"


KIND = CacheKind(
    "paged",
    ("paged", "paged:PAGE_SIZE"),
    lambda size, sinks: PagedCache(size),
    lambda size, sinks: f"paged, {size} tokens per page",
    size=64,
    obstacle=_obstacle,
    layout="paged",
)
