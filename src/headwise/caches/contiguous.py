"""A contiguous cache for one layer: a pair of tensors that grows without copying at every token.

It covers memory and positions, not attention: it hands out strided views of what it holds.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.caches.holders import alias, others_hold
from headwise.caches.large_pages import advise_large_pages
from headwise.caches.protocol import (
    Cache,
    CacheKind,
    check_crop,
    check_index,
    check_pair,
    check_range,
)
from headwise.errors import CapacityError, ShapeError
from headwise.ops.backend import choose_offer

# Below this many bytes a full buffer doubles; above, it grows to 1.25 times what it must hold.
_DOUBLE_BELOW = 64 * 2**20
_FIRST_CAPACITY = 16


class ContiguousCache(Cache):
    """Two tensors [B, heads, L, dim] side by side: (key, value), or MLA's (latent, rope key).

    Example:
        >>> import torch
        >>> from headwise.caches import ContiguousCache
        >>> cache = ContiguousCache()
        >>> key, value = cache.append(torch.randn(1, 3, 10, 64), torch.randn(1, 3, 10, 64))
        >>> key, value = cache.append(torch.randn(1, 3, 1, 64), torch.randn(1, 3, 1, 64))
        >>> key.shape, cache.length, cache.nbytes
        (torch.Size([1, 3, 11, 64]), 11, 16896)

    An append copies the new tokens only, save when the buffer is full: then it grows, geometrically
    and to at most 1.25 times what it holds once that is more than 64 MiB. The views that it hands
    out never change: an append that would write over rows that somebody still holds, which can only
    be after a crop, moves to a new buffer first. A `copy.copy` shares the buffer until either of
    the two appends. Appends are in place, so no gradient flows through them.
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self._dropped = False  # whether views may reach rows behind the last token
        self._like: tuple[Any, ...] = ()  # the last tokens that fitted

    def __copy__(self) -> "ContiguousCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if self._buffers is not None:
            twin._buffers = alias(self._buffers[0]), alias(self._buffers[1])
            self._dropped = twin._dropped = True  # what the other appends lies there
        return twin

    @property
    def first(self) -> Tensor | None:
        """The held part of the first tensor, [B, heads, length, dim]; None before any append."""
        return None if self._buffers is None else self._buffers[0][:, :, : self.length]

    @property
    def second(self) -> Tensor | None:
        """The held part of the second tensor, [B, heads, length, dim]; None before any append."""
        return None if self._buffers is None else self._buffers[1][:, :, : self.length]

    @property
    def name(self) -> str:
        """contiguous"""
        return KIND.name

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        return None if self._buffers is None else self._buffers[0].shape[0]

    @property
    def kept(self) -> tuple[str, ...]:
        """Of the two tensors."""
        return "first", "second"

    @property
    def capacity(self) -> int:
        """Tokens that fit before the next growth."""
        return 0 if self._buffers is None else self._buffers[0].shape[2]

    @property
    def viewed(self) -> bool:
        """Whether somebody else holds a part of the buffers: a view, or a copy of this cache."""
        return self._buffers is not None and any(map(others_hold, self._buffers))

    @property
    def nbytes(self) -> int:
        """Bytes that the held tokens take."""
        return self.length * self._bytes_per_token()

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""
        return self.capacity * self._bytes_per_token()

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim'].

        Returns:
            Views of everything held: [B, heads, L, dim] and [B, heads, L, dim'].

        Raises:
            ShapeError: the tokens do not fit what the cache holds.
            UnsupportedError: the tokens need gradients.
            CapacityError: the grown buffer cannot be allocated; the cache is unchanged.
        """
        self._check(first, second)
        before, count = self.length, first.shape[2]
        needed = before + count
        if self._buffers is None or needed > self._buffers[0].shape[2]:
            self._grow(needed, first, second)
        elif self._dropped and count:
            if self.viewed:
                self._grow(needed, first, second)
            self._dropped = False
        assert self._buffers is not None
        keys, values = self._buffers
        # .data: for autograd, views that are operands in a graph have not changed
        keys.data.narrow(2, before, count).copy_(first)
        values.data.narrow(2, before, count).copy_(second)
        self.length = needed
        return keys.narrow(2, 0, needed), values.narrow(2, 0, needed)

    def room(
        self, batch: int, heads: int, count: int, like: Tensor | None
    ) -> tuple[Tensor, Tensor, None] | None:
        """The buffers [B, heads, capacity, dim], if `count` tokens can be written behind the last.

        (And None, where a paged cache has its table.)

        None where an append has more to do: the first one, a full buffer, rows that may be held,
        tokens of other sizes, of another dtype than `like` or elsewhere. Who has written them says
        so by `wrote`.
        """
        if self._buffers is None or self._dropped:
            return None
        first, second = self._buffers
        fits = (
            (first.shape[0], first.shape[1]) == (batch, heads)
            and self.length + count <= first.shape[2]
            and are_like(first, second, like)
        )
        return (first, second, None) if fits else None

    def wrote(self, count: int) -> None:
        """Hold `count` tokens more, which were written into the buffers of `room`."""
        self.length += count

    def _check(self, first: Tensor, second: Tensor) -> None:
        """Raise unless the tokens fit; what is like the last ones needs no second look."""
        whole = isinstance(first, Tensor) and isinstance(second, Tensor)
        if whole and not torch.is_grad_enabled():
            like = (first.shape, second.shape, first.dtype, second.dtype, first.device)
            if like == self._like and second.device == first.device:
                return
        check_pair(first, second)
        if self._buffers is not None:
            for buffer, tokens in zip(self._buffers, (first, second), strict=True):
                _check_fits(buffer, tokens)
        self._like = (first.shape, second.shape, first.dtype, second.dtype, first.device)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ShapeError: `length` is negative or more than is held.
        """
        check_crop(length, self.length)
        self._dropped = self._dropped or length < self.length
        self.length = length

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: the new buffers cannot be allocated; the cache is unchanged.
        """
        check_index(index)
        if self._buffers is None:
            return
        batch = self._buffers[0].shape[0]
        check_range(index, batch)
        with torch.inference_mode(False), torch.no_grad():
            index = index.to(self._buffers[0].device)
            if index.shape[0] == batch and not self.viewed:
                choose_offer("reorder", None, *self._buffers)(*self._buffers, index, self.length)
                return
            selected = self._allocate(self._buffers, index.shape[0], self.length, self.capacity)
            for fresh, old in zip(selected, self._buffers, strict=True):
                rows = old[:, :, : self.length].index_select(0, index)
                fresh[:, :, : self.length].copy_(rows)
            self._buffers, self._dropped, self._like = selected, False, ()

    def rows(self, sequence: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """Tokens `begin` to `end` of a sequence, [heads, S, dim], views."""
        assert self._buffers is not None
        assert 0 <= begin <= end <= self.length
        return tuple(buffer[sequence, :, begin:end] for buffer in self._buffers)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._buffers = None
        self.length, self._dropped, self._like = 0, False, ()

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        if self._buffers is not None:
            with torch.inference_mode(False):
                first, second = self._buffers
                self._buffers, self._like = (first.to(device), second.to(device)), ()

    def _bytes_per_token(self) -> int:
        return 0 if self._buffers is None else sum(map(_bytes_per_token, self._buffers))

    def _grow(self, needed: int, first: Tensor, second: Tensor) -> None:
        # normal tensors even under inference mode, so that appends go on working outside it
        with torch.inference_mode(False), torch.no_grad():
            grown = self._allocate((first, second), first.shape[0], needed)
            if self._buffers is not None:
                for fresh, old in zip(grown, self._buffers, strict=True):
                    fresh[:, :, : self.length].copy_(old[:, :, : self.length])
            self._buffers, self._dropped = grown, False

    def _room(self, needed: int, bytes_per_token: int) -> int:
        """Tokens to allocate for when `needed` must fit."""
        return grown_capacity(needed, bytes_per_token)

    def _allocate(
        self, like: tuple[Tensor, Tensor], batch: int, needed: int, at_most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Empty buffers with room for `needed` tokens of `batch` sequences, and to grow."""
        heads = like[0].shape[1]
        per_token = batch * heads * sum(t.shape[3] * t.element_size() for t in like)
        capacity = self._room(needed, per_token)
        if at_most is not None:
            capacity = min(capacity, at_most)
        try:
            first, second = (t.new_empty(batch, heads, capacity, t.shape[3]) for t in like)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise CapacityError(
                f"the cache needs {capacity * per_token:,} bytes for {capacity:,} tokens of a "
                f"layer, beside the {self.reserved_bytes:,} that it has: {reason}"
            ) from error
        for buffer in (first, second):
            advise_large_pages(buffer)
        return first, second


def grown_capacity(needed: int, bytes_per_token: int) -> int:
    """Tokens to make room for when `needed` must fit.

    >>> grown_capacity(1, 1024), grown_capacity(100, 1024)
    (16, 200)
    >>> grown_capacity(100_000, 1024)
    125000
    """
    doubled = max(_FIRST_CAPACITY, 2 * needed)
    if doubled * bytes_per_token <= _DOUBLE_BELOW:
        return doubled
    # past the limit by growth, but never below what the limit alone would give
    return max(needed + needed // 4, min(doubled, _DOUBLE_BELOW // max(1, bytes_per_token)))


def are_like(first: Tensor, second: Tensor, like: Tensor | None) -> bool:
    """Whether both are of the dtype of `like` and where it is; None asks for nothing."""
    return like is None or (
        first.dtype == second.dtype == like.dtype and first.device == second.device == like.device
    )


def _bytes_per_token(tensor: Tensor) -> int:
    batch, heads, _, dim = tensor.shape
    return batch * heads * dim * tensor.element_size()


def _check_fits(buffer: Tensor, tokens: Tensor) -> None:
    expected = (buffer.shape[0], buffer.shape[1], buffer.shape[3])
    sizes = (tokens.shape[0], tokens.shape[1], tokens.shape[3])
    if sizes != expected:
        raise ShapeError(
            f"tokens have batch, heads, dim {list(sizes)}, the cache holds {list(expected)}"
        )
    if tokens.dtype != buffer.dtype or tokens.device != buffer.device:
        raise ShapeError(
            f"tokens are {tokens.dtype} on {tokens.device}, the cache holds {buffer.dtype} on "
            f"{buffer.device}"
        )


KIND = CacheKind(
    "contiguous",
    ("contiguous",),
    lambda choice: ContiguousCache(),
    lambda choice: "contiguous, grown in place",
)
