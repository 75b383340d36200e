"""A quantised cache for one layer: rows as integers with scales, in 8 or in 4 bits."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.paged import PagedCache
from headwise.caches.pages import size_obstacle
from headwise.caches.protocol import Cache, CacheKind, check_pair
from headwise.caches.rounding import check_bits, rounded
from headwise.errors import CapacityError, ShapeError
from headwise.ops import Bits, QuantKV


class QuantizedCache(Cache):
    """Two tensors [B, heads, L, dim] side by side, as integers: (key, value), or MLA's pair.

    Example:
        >>> import torch, headwise
        >>> from headwise.caches import QuantizedCache
        >>> cache = QuantizedCache(bits=8)
        >>> kv = cache.append(torch.randn(1, 3, 10, 64), torch.randn(1, 3, 10, 64))
        >>> cache.length, cache.nbytes  # 64 bytes and a scale of 4 per row
        (10, 4080)
        >>> headwise.attention(torch.randn(1, 9, 1, 64), kv=kv).shape
        torch.Size([1, 9, 1, 64])

    Tokens are rounded when they are appended, every one of them; the kernels read the integers. The
    views that it hands out never change, and a `copy.copy` shares memory until either of the two
    appends, as with `ContiguousCache`. No gradient flows through them.

    Args:
        bits: 8 (one scale per row) or 4 (one scale per 32 elements, of an even dim).

    Raises:
        ShapeError: other bits.
    """

    gives = "view"

    def __init__(self, bits: Bits = 8) -> None:
        check_bits(bits)
        self.bits: Bits = bits
        self._integers, self._scales = ContiguousCache(), ContiguousCache()
        self._kind: tuple[int, int, torch.dtype] | None = None

    def __copy__(self) -> "QuantizedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._integers, twin._scales = copy(self._integers), copy(self._scales)
        return twin

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._integers.length

    @property
    def name(self) -> str:
        """int8 or int4"""
        return f"int{self.bits}"

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        return self._integers.batch

    @property
    def kept(self) -> tuple[str, ...]:
        """Of integers and scales."""
        return "first", "first_scales", "second", "second_scales"

    @property
    def view(self) -> QuantKV | None:
        """What is held; None before any append."""
        key, value = self._integers.first, self._integers.second
        key_scales, value_scales = self._scales.first, self._scales.second
        if key is None or value is None or key_scales is None or value_scales is None:
            return None
        return QuantKV(
            key=key,
            key_scales=key_scales,
            value=value,
            value_scales=value_scales,
            bits=self.bits,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the held tokens take, their scales included."""
        return self._integers.nbytes + self._scales.nbytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""
        return self._integers.reserved_bytes + self._scales.reserved_bytes

    def append(self, first: Tensor, second: Tensor) -> QuantKV:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim'].

        Returns:
            A view of everything held, for `headwise.attention(query, kv=view)`.

        Raises:
            ShapeError: the tokens do not fit what the cache holds.
            UnsupportedError: the tokens need gradients.
            CapacityError: the grown buffers cannot be allocated; the cache is unchanged.
        """
        check_pair(first, second)
        kind = (first.shape[3], second.shape[3], first.dtype)
        if self._kind not in (None, kind):
            raise ShapeError(f"tokens have dims and dtype {kind}, the cache holds {self._kind}")
        before = self.length
        (key, key_scales), (value, value_scales) = (
            rounded(tokens, self.bits) for tokens in (first, second)
        )
        self._integers.append(key, value)
        try:
            self._scales.append(key_scales, value_scales)
        except CapacityError:
            if self._kind is None:
                self._integers.reset()
            else:
                self._integers.crop(before)
            raise
        self._kind = kind
        view = self.view
        assert view is not None
        return view

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ShapeError: `length` is negative or more than is held.
        """
        self._integers.crop(length)
        self._scales.crop(length)

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: the new buffers cannot be allocated; the cache is unchanged.
        """
        # the scales first: of the two, integers are what may not fit, and nothing changes then
        before = copy(self._scales)
        self._scales.select(index)
        try:
            self._integers.select(index)
        except CapacityError:
            self._scales = before
            raise

    def rows(self, sequence: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """Integers and scales of tokens `begin` to `end`, [heads, S, dim], views."""
        first, second = self._integers.rows(sequence, begin, end)
        first_scales, second_scales = self._scales.rows(sequence, begin, end)
        return first, first_scales, second, second_scales

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._integers.reset()
        self._scales.reset()
        self._kind = None

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        self._integers.to(device)
        self._scales.to(device)


def _kind(bits: Bits, words: str) -> CacheKind:
    name = f"int{bits}"

    def make(choice: Any) -> Cache:
        return PagedCache(choice.size, bits=bits) if choice.size else QuantizedCache(bits)

    def says(choice: Any) -> str:
        return f"{name}, {words}" + (f", {choice.size} tokens per page" if choice.size else "")

    return CacheKind(
        name,
        (name, f"{name}:PAGE_SIZE"),
        make,
        says,
        obstacle=size_obstacle,
        layout=lambda size: f"paged {name}" if size else name,
        bits=bits,
    )


INT8 = _kind(8, "one scale per row")
INT4 = _kind(4, "rotated, one scale per 32 elements")
