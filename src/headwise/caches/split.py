"""A rank's part of a context that several processes hold: its own blocks of tokens, in a cache."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.caches.protocol import Cache, check_crop
from headwise.errors import OptionError, ShapeError
from headwise.ops import KV

# Tokens of a block: the most that a rank holds beyond its part of a context.
BLOCK = 64


@dataclass(frozen=True)
class Share:
    """Which tokens a rank holds: every block whose number is `rank`, modulo `ranks`.

    >>> share = Share(rank=1, ranks=2, block=4)
    >>> share.held(14), share.positions(14).tolist()
    (6, [4, 5, 6, 7, 12, 13])

    Raises:
        OptionError: a rank that is none of `ranks`, or an empty block.
    """

    rank: int
    ranks: int
    block: int = BLOCK

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or self.block < 1:
            raise OptionError(
                f"rank {self.rank} of {self.ranks}, in blocks of {self.block}: expected a rank "
                "from 0 on, below the number of ranks, and blocks of at least 1 token"
            )

    def held(self, length: int) -> int:
        """How many of the first `length` tokens are its own: at most a block more than 1/N."""
        rounds, rest = divmod(length, self.ranks * self.block)
        return rounds * self.block + min(max(rest - self.rank * self.block, 0), self.block)

    def positions(self, length: int) -> Tensor:
        """Where its own tokens of the first `length` are, int64 in their order, on the CPU."""
        index = torch.arange(self.held(length))
        return index + (index // self.block * (self.ranks - 1) + self.rank) * self.block


class SplitCache(Cache):
    """A cache that is given every token and holds those of one rank.

    Example:
        >>> import torch
        >>> from headwise.caches import ContiguousCache, Share, SplitCache
        >>> cache = SplitCache(ContiguousCache(), Share(rank=1, ranks=2, block=64))
        >>> key, value = cache.append(torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8))
        >>> key.shape, cache.length, cache.positions[0].item()  # tokens 64 to 99
        (torch.Size([1, 2, 36, 8]), 100, 64)

    `length` counts all tokens; what is allocated, and `nbytes`, are the rank's own. What an append
    gives are the rank's rows, which lie at `positions`: `attention(..., key_positions=)` attends to
    them, and `merge_attention` to what all ranks have.

    Args:
        own: an empty cache that gives all of its rows, in any form.
        share: which tokens are the rank's.

    Raises:
        ShapeError: `own` holds tokens already, or drops some.
    """

    gives = "split"

    def __init__(self, own: Any, share: Share) -> None:
        if own.gives not in ("rows", "view") or own.length:
            raise ShapeError(
                f"a {own.name} cache of {own.length} tokens, expected an empty one that holds "
                "every token"
            )
        self.own, self.share, self.length = own, share, 0
        self._table = share.positions(0)

    def __copy__(self) -> "SplitCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.own = copy(self.own)
        return twin

    @property
    def positions(self) -> Tensor:
        """Of the tokens that are held, int64 in their order, on the CPU."""
        return self.positions_of(self.length)

    def positions_of(self, length: int) -> Tensor:
        """Of those that were held at that length."""
        held = self.share.held(length)
        if len(self._table) < held:  # ahead, so that it is not made for every token
            self._table = self.share.positions(2 * length)
        return self._table[:held]

    @property
    def name(self) -> str:
        """That of the rank's own cache."""
        return str(self.own.name)

    @property
    def nbytes(self) -> int:
        """Bytes that the rank's tokens take."""
        return int(self.own.nbytes)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the rank has allocated."""
        return int(self.own.reserved_bytes)

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        batch: int | None = self.own.batch
        return batch

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | KV:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim'], and keep the rank's.

        Returns:
            What its own cache returns: all of the rank's rows.

        Raises:
            ShapeError, UnsupportedError, CapacityError: as its own cache; nothing is changed then.
        """
        count = first.shape[2]
        before, after = self.share.held(self.length), self.share.held(self.length + count)
        if after - before < count:
            own = self.share.positions(self.length + count)[before:] - self.length
            own = own.to(first.device)
            first, second = (rows.index_select(2, own) for rows in (first, second))
        given: tuple[Tensor, Tensor] | KV = self.own.append(first, second)
        self.length += count
        return given

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of all, and of these the rank's.

        Raises:
            ShapeError: `length` is negative or more than were appended.
        """
        check_crop(length, self.length)
        self.own.crop(self.share.held(length))
        self.length = length

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: the new buffers cannot be allocated; the cache is unchanged.
        """
        self.own.select(index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.own.reset()
        self.length = 0

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        self.own.to(device)
