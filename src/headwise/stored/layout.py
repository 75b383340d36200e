"""How the rows of all layers lie in a page of 64 tokens, in files and in memory alike."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headwise.base.mapped import ALIGNMENT
from headwise.base.tensor_files import DTYPES
from headwise.errors import LoadError

PAGE = 64
# The names of safetensors, by what rows are kept as.
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# No model has more; what a file says is checked against them before it is multiplied.
_MOST_HEADS, _MOST_DIM, _MOST_LAYERS = 2**16, 2**20, 2**14
_BETWEEN = 64  # bytes that each layer's rows begin at a multiple of


@dataclass(frozen=True)
class Rows:
    """Rows that one layer keeps for each token: `heads` of them, of `dim` elements.

    name: "first" and "second" are those of a `Cache`, "first_scales" their scales, and so on.
    """

    layer: int
    name: str
    dtype: torch.dtype
    heads: int
    dim: int

    @property
    def nbytes(self) -> int:
        """Of a page."""
        return PAGE * self.heads * self.dim * self.dtype.itemsize

    def as_json(self) -> list[Any]:
        """Plain data, that `read` reads."""
        return [self.layer, self.name, NAMES[self.dtype], self.heads, self.dim]

    @classmethod
    def read(cls, data: Any) -> "Rows":
        """From what a file says.

        Raises:
            LoadError: sizes that no model has.
        """
        layer, name, dtype, heads, dim = data
        sizes = ((layer, _MOST_LAYERS), (heads, _MOST_HEADS), (dim, _MOST_DIM))
        if dtype not in DTYPES or not all(type(n) is int and 0 <= n < most for n, most in sizes):
            raise LoadError(f"its rows are {str(data)[:100]}, which no model has")
        return cls(layer, str(name)[:40], DTYPES[dtype], heads, dim)


@dataclass(frozen=True)
class PageLayout:
    """The rows of every layer, in the order in which they lie in a page.

    A row of tensors [heads, 64, dim] makes a page. All pages are equally long, so that one run of
    memory over files holds those of every layer, each at a fixed distance from the next.

    >>> layout = PageLayout((Rows(0, "first", torch.float32, 2, 8),))
    >>> layout.page_bytes
    4096
    """

    rows: tuple[Rows, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each one's rows begin in a page."""
        offsets, end = [], 0
        for rows in self.rows:
            offsets.append(end)
            end += -(-rows.nbytes // _BETWEEN) * _BETWEEN
        return (*offsets, end)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page, a multiple of what can be mapped."""
        return -(-self.offsets[-1] // ALIGNMENT) * ALIGNMENT

    def pools(self, memory: mmap.mmap) -> dict[tuple[int, str], Tensor]:
        """Tensors [heads, pages, 64, dim] over the pages of a memory, by layer and name.

        Each has a storage of its own, so that who holds one is told from who holds another.
        """
        pools, pages = {}, len(memory) // self.page_bytes if self.page_bytes else 0
        for rows, offset in zip(self.rows, self.offsets, strict=False):
            size = rows.dtype.itemsize
            shape = (rows.heads, pages, PAGE, rows.dim)
            if 0 in shape:
                pools[rows.layer, rows.name] = torch.empty(shape, dtype=rows.dtype)
                continue
            count = ((pages - 1) * self.page_bytes + rows.nbytes) // size
            flat = torch.frombuffer(memory, dtype=rows.dtype, offset=offset, count=count)
            strides = (PAGE * rows.dim, self.page_bytes // size, rows.dim, 1)
            pool = torch.empty(0, dtype=rows.dtype)
            pools[rows.layer, rows.name] = pool.set_(flat.untyped_storage(), 0, shape, strides)
        return pools

    def fill(self, page: bytearray, tokens: Mapping[tuple[int, str], Tensor]) -> None:
        """Write rows [heads, n, dim], n at most 64, to the beginning of a page."""
        for rows, offset in zip(self.rows, self.offsets, strict=False):
            if rows.nbytes:
                count = rows.nbytes // rows.dtype.itemsize
                flat = torch.frombuffer(page, dtype=rows.dtype, offset=offset, count=count)
                given = tokens[rows.layer, rows.name]
                flat.view(rows.heads, PAGE, rows.dim)[:, : given.shape[1]].copy_(given)

    def as_json(self) -> list[Any]:
        """Plain data, that `read` reads."""
        return [rows.as_json() for rows in self.rows]

    @classmethod
    def read(cls, data: Sequence[Any]) -> "PageLayout":
        """From what a file says.

        Raises:
            LoadError: sizes that no model has, or the same rows twice.
        """
        rows = tuple(Rows.read(each) for each in data)
        if len({(each.layer, each.name) for each in rows}) < len(rows):
            raise LoadError("it has rows of one layer twice")
        return cls(rows)
