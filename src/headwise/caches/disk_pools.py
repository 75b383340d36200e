"""The memory of a cache on disk: a file without a name, mapped, and pools of pages in it."""

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import reason
from headwise.caches.holders import alias, others_hold
from headwise.caches.pools import Pools
from headwise.errors import CapacityError, UnsupportedError

# Address space of a file, to which it may grow: a process has some 2,000 times as much.
_MOST = 1 << 36
# The rows of a pool begin in a page at a multiple of so many bytes.
_LINE = 64


class PageFile:
    """A file that has no name and goes with the process, and the memory that shows it.

    Nothing is left of it whatever becomes of the process, and nobody else can reach it.

    Args:
        folder: where it lies.

    Raises:
        CapacityError: the folder takes no file, or there is no address space for it.
    """

    def __init__(self, folder: Path) -> None:
        import resource  # which Windows does not have

        self.folder, self.size, self.process = folder, 0, os.getpid()
        try:
            with tempfile.TemporaryFile(dir=folder) as stream:
                self._file = os.dup(stream.fileno())
            weakref.finalize(self, os.close, self._file)
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            room = min(shutil.disk_usage(folder).total, _MOST if most < 0 else most)
            room -= room % mmap.ALLOCATIONGRANULARITY
            # a mapping is not made beyond the end of a file, but may be there afterwards
            os.ftruncate(self._file, room)
            self.memory = mmap.mmap(self._file, room)
            os.ftruncate(self._file, 0)
        except (OSError, ValueError, OverflowError) as error:
            raise CapacityError(f"{folder} takes no file for a cache: {reason(error)}") from error

    def grow(self, size: int) -> None:
        """Have `size` bytes on the disk.

        Raises:
            CapacityError: the disk has no room for them; the file is as it was.
        """
        more = size - self.size
        if more <= 0:
            return
        try:
            if size > len(self.memory):
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            # a write to what is mapped cannot fail: its place on the disk is there before
            os.posix_fallocate(self._file, self.size, more)
        except OSError as error:
            os.ftruncate(self._file, self.size)
            disk = os.fstatvfs(self._file)  # the folder may be gone
            free = disk.f_bavail * disk.f_frsize
            raise CapacityError(
                f"a layer's rows in {self.folder} need {more:,} bytes more, and {free:,} are free: "
                f"{reason(error)}"
            ) from error
        self.size = size

    def let_go(self) -> None:
        """Take it out of this process' memory; it stays in the file."""
        self.memory.madvise(mmap.MADV_DONTNEED)

    def read_ahead(self, begin: int, size: int) -> None:
        """Have the system read a part, without waiting for it."""
        os.posix_fadvise(self._file, begin, size, os.POSIX_FADV_WILLNEED)


class DiskPools(Pools):
    """Pools side by side in a file: page after page, and in each the rows of all of them."""

    def __init__(self, file: PageFile, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.file = file

    @classmethod
    def make(cls, folder: Path, tokens: Sequence[Tensor], page_size: int) -> "DiskPools":
        """Pools without pages for tokens like these, [B, heads, S, dim].

        Raises:
            UnsupportedError: they are not on the CPU.
            CapacityError: as `PageFile`.
        """
        for own in tokens:
            if own.device.type != "cpu":
                raise UnsupportedError(
                    f"a cache on disk takes tokens on the CPU, and these are on {own.device}: "
                    "take another cache"
                )
        file, storage = PageFile(folder), torch.empty(0).untyped_storage()
        # the rows of each begin where its numbers may
        parts = [own.shape[1] * page_size * own.shape[3] * own.element_size() for own in tokens]
        parts = [-(-size // _LINE) * _LINE for size in parts]
        tensors, begin = [], 0
        for own, size in zip(tokens, parts, strict=True):
            heads, dim, item = own.shape[1], own.shape[3], own.element_size()
            strides = page_size * dim, sum(parts) // item, dim, 1
            shape = heads, 0, page_size, dim
            tensors.append(_over(storage, own.dtype, begin // item, shape, strides))
            begin += size
        return cls(file, tensors)

    @classmethod
    def holding(cls, folder: Path, rows: Sequence[Tensor], pages: int) -> "DiskPools":
        """New ones of `pages` pages, the first of which are these.

        Raises:
            CapacityError: as `PageFile`, or the disk has no room for them.
        """
        like = [own.new_empty(0, len(own), 0, own.shape[3]) for own in rows]
        pools = cls.make(folder, like, rows[0].shape[2]).grown(pages, 0)
        for new, old in zip(pools.tensors, rows, strict=True):
            new[:, : old.shape[1]].copy_(old)
        pools.file.let_go()  # who reads them counts them
        return pools

    def __copy__(self) -> "DiskPools":
        return DiskPools(self.file, [alias(pool) for pool in self.tensors])

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiskPools":
        return self  # of a cache that is copied: `first` has made them

    def __reduce__(self) -> Any:
        pages = self.tensors[0].shape[1]
        return DiskPools.holding, (self.file.folder, [pool.clone() for pool in self.tensors], pages)

    @property
    def viewed(self) -> bool:
        """Whether somebody else holds a part of them."""
        return others_hold(self.tensors[0], len(self.tensors))

    @property
    def bytes_per_page(self) -> int:
        """Of all of them, in the file."""
        return self.tensors[0].stride(1) * self.tensors[0].element_size()

    def to(self, device: torch.device | str) -> "DiskPools":
        """The same, which are on the CPU.

        Raises:
            UnsupportedError: another device.
        """
        if torch.device(device).type != "cpu":
            raise UnsupportedError(f"a cache on disk stays on the CPU, and was to go to {device}")
        return self

    def grown(self, pages: int, held: int) -> "DiskPools":
        """These with `pages` pages; where others hold them new ones that begin with `held`.

        Raises:
            CapacityError: the disk has no room for them.
        """
        if self.viewed:
            return self._moved(pages, held)
        size = pages * self.bytes_per_page
        self.file.grow(size)
        # of the file's size, not of the address space: a view that is saved takes its storage along
        storage = torch.empty(0).untyped_storage()
        if size > 0:
            storage = torch.frombuffer(
                self.file.memory, dtype=torch.uint8, count=size
            ).untyped_storage()
        tensors = []
        for pool in self.tensors:
            shape = len(pool), pages, *pool.shape[2:]
            begin = int(pool.storage_offset())
            tensors.append(_over(storage, pool.dtype, begin, shape, pool.stride()))
        return DiskPools(self.file, tensors)

    def first(self, pages: int) -> "DiskPools":
        """Copies of the first pages, in a file of their own."""
        return self._moved(pages, pages)

    def _moved(self, pages: int, held: int) -> "DiskPools":
        rows = [pool[:, :held] for pool in self.tensors]
        try:
            return self.holding(self.file.folder, rows, pages)
        finally:
            self.file.let_go()

    def read_ahead(self, pages: Sequence[int]) -> None:
        """Have the system read these pages, in ascending order, without waiting for them."""
        size, begin = self.bytes_per_page, 0
        for index in range(1, len(pages) + 1):
            if index == len(pages) or pages[index] != pages[index - 1] + 1:
                self.file.read_ahead(pages[begin] * size, (index - begin) * size)
                begin = index


def _over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    """A tensor over a part of a storage that is no view of another one, so that it counts once."""
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
