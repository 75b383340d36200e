"""The memory of a paged cache: pools of pages, side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.caches.holders import alias, others_hold
from headwise.caches.large_pages import advise_large_pages
from headwise.errors import CapacityError


class Pools:
    """Tensors [heads, pages, page size, dim]: of keys and values, or of those and their scales.

    They agree in the first three dims, and may have any strides that keep a row together.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    @classmethod
    def empty(cls, tokens: Sequence[Tensor], page_size: int) -> "Pools":
        """Pools without pages for tokens like these, [B, heads, S, dim]."""
        return cls([own.new_empty(own.shape[1], 0, page_size, own.shape[3]) for own in tokens])

    def __copy__(self) -> "Pools":
        return Pools([alias(pool) for pool in self.tensors])

    @property
    def viewed(self) -> bool:
        """Whether somebody else holds a part of them: a view, or a copy of the cache."""
        return any(map(others_hold, self.tensors))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one row of all of them, and all heads."""
        return sum(pool.shape[0] * pool.shape[3] * pool.element_size() for pool in self.tensors)

    def to(self, device: torch.device | str) -> "Pools":
        """The same on `device`."""
        return Pools([pool.to(device) for pool in self.tensors])

    def grown(self, pages: int, held: int) -> "Pools":
        """New ones of `pages` pages that begin with the first `held` of these.

        Raises:
            CapacityError: they cannot be allocated.
        """
        size = self.tensors[0].shape[2]
        try:
            fresh = [pool.new_empty(len(pool), pages, *pool.shape[2:]) for pool in self.tensors]
        except (RuntimeError, MemoryError) as error:
            per_page, reason = size * self.bytes_per_token, str(error).partition("\n")[0]
            raise CapacityError(
                f"the pool needs {pages * per_page:,} bytes for {pages:,} pages of a layer, "
                f"beside the {held * per_page:,} that it has: {reason}"
            ) from error
        for new, old in zip(fresh, self.tensors, strict=True):
            advise_large_pages(new)
            new[:, :held].copy_(old[:, :held])
        return Pools(fresh)

    def to_fit(self, pages: int, held: int, least: int) -> "Pools":
        """As `grown`, and where there is no room for as many, with `least` pages.

        Raises:
            CapacityError: as `grown` with `least`.
        """
        try:
            return self.grown(pages, held)
        except CapacityError:
            if least == pages:
                raise
        return self.grown(least, held)

    def first(self, pages: int) -> "Pools":
        """Copies of the first pages, in memory of their own."""
        return Pools(
            [pool[:, :pages].clone(memory_format=torch.contiguous_format) for pool in self.tensors]
        )

    def copy_rows(self, page: int, fresh: int, rows: int) -> None:
        """Copy the first rows of a page to another."""
        for pool in self.tensors:
            pool.data[:, fresh, :rows].copy_(pool[:, page, :rows])

    def write_one(self, tokens: Sequence[Tensor], page: int, row: int) -> None:
        """Write the only token of the only sequence, [1, heads, 1, dim]."""
        for pool, own in zip(self.tensors, tokens, strict=True):
            pool.data[:, page, row].copy_(own[0, :, 0])

    def write(
        self, tokens: Sequence[Tensor], pages: Tensor, rows: Tensor, real: Tensor | None
    ) -> None:
        """Write tokens [B, heads, S, dim] of all sequences to the places that `Pages` says."""
        for pool, own in zip(self.tensors, tokens, strict=True):
            # [heads, B, S, dim]; in place whatever the strides of the pool are
            lines = own.transpose(0, 1)
            pool.data[:, pages, rows] = lines.flatten(1, 2) if real is None else lines[:, real]
