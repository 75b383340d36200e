"""A paged cache whose pages lie on disk: a context may be larger than memory."""

import os
from pathlib import Path

import torch
from torch import Tensor

from headwise.base.files import reason
from headwise.caches.disk_pools import DiskPools
from headwise.caches.paged import PagedCache
from headwise.caches.pages import Step
from headwise.caches.pools import Pools
from headwise.caches.protocol import CacheKind
from headwise.caches.resident import Resident
from headwise.errors import CapacityError, OptionError, UnsupportedError
from headwise.ops import row_bytes


class DiskCache(PagedCache):
    """A `PagedCache` over a file, which the kernels read in place.

    Example:
        >>> import tempfile, torch
        >>> from headwise.caches import DiskCache
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = DiskCache(folder)
        ...     kv = cache.append(torch.randn(1, 3, 40, 64), torch.randn(1, 3, 40, 64))
        >>> kv
        PagedKV(B=1, K=3, L=40, D=64, V=64)

    The file has no name, so that nothing is left of it when the process ends, however it does. A
    row that is read comes into memory, and stays there while there is room for it.

    Args:
        folder: where the file lies; it exists.
        page_size: as in `PagedCache`.
        resident: what may be in memory, which the caches of a model share; by default what the
            system gives.

    Attributes:
        sketched: whether queries choose by a sketch, which counts as well.
    """

    def __init__(
        self, folder: str | Path, page_size: int = 64, resident: Resident | None = None
    ) -> None:
        super().__init__(page_size)
        self.folder = Path(folder)
        self._resident = Resident() if resident is None else resident
        self.sketched = False

    @property
    def name(self) -> str:
        """As "disk:FOLDER"."""
        return f"{KIND.name}:{self.folder}"

    def room(
        self, batch: int, heads: int, count: int, like: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `PagedCache.room`; None while rows come from the disk: they are asked for early."""
        if self._resident.reads_ahead or self._is_of_another_process():
            return None
        room = super().room(batch, heads, count, like)
        try:
            if room is not None:
                self._enter(*room[:2], self._pages.used)
        except CapacityError:
            return None  # an append says it
        return room

    def read_ahead(self, indices: Tensor | None = None) -> None:
        """Have the system read the tokens that queries chose, or all, if rows come from the disk.

        indices: int32 [B, K, S, T] of tokens, -1 for none.
        """
        if not self._resident.reads_ahead or self._pools is None:
            return
        assert isinstance(self._pools, DiskPools)
        pages = self._pages
        for sequence, length in enumerate(pages.lengths):
            table = pages.table[sequence, : pages.of(length)].long()
            if indices is not None:
                chosen = indices[sequence]
                table = table[torch.unique(chosen[chosen >= 0].long() // self.page_size)]
            self._pools.read_ahead(torch.unique(table).tolist())

    def let_go(self) -> None:
        """Take what is held out of memory; it stays in the file."""
        if isinstance(self._pools, DiskPools):
            self._pools.file.let_go()

    def _enter(self, first: Tensor, second: Tensor, pages: int) -> None:
        """Have room in memory for so many pages of rows [..., heads, n, dim]."""
        heads, tokens = first.shape[1], pages * self.page_size
        rows = sum(heads * each.shape[3] * each.element_size() for each in (first, second))
        sketch = heads * row_bytes(first.shape[3], 4) if self.sketched else 0
        self._resident.enter(self, tokens * rows, tokens * sketch)

    def rows(self, sequence: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """As `PagedCache.rows`; what is read counts."""
        assert self._pools is not None
        first, second = (pool.transpose(0, 1) for pool in self._pools.tensors)
        self._enter(first, second, self._pages.used)
        return super().rows(sequence, begin, end)

    def _is_of_another_process(self) -> bool:
        """Whether a fork made this a copy of a cache whose file the first process goes on with."""
        return isinstance(self._pools, DiskPools) and self._pools.file.process != os.getpid()

    def _make_room(self, step: Step, tokens: tuple[Tensor, ...]) -> None:
        if self._is_of_another_process():
            raise UnsupportedError(
                "a cache on disk is written by the process that made it alone: make a new one "
                "after a fork"
            )
        self._enter(tokens[0], tokens[1], self._pages.used + step.pages)
        super()._make_room(step, tokens)

    def _new_pools(self, tokens: tuple[Tensor, ...]) -> Pools:
        return DiskPools.make(self.folder, tokens, self.page_size)


def check_folder(folder: str) -> Path:
    """The folder of a cache on disk, made if it is not there.

    Raises:
        OptionError: no file can be written there.
        UnsupportedError: the system is none on which caches lie on disk.
    """
    if not hasattr(os, "posix_fallocate") or not hasattr(os, "posix_fadvise"):
        raise UnsupportedError("a cache on disk needs Linux: take another cache")
    try:
        path = Path(folder).expanduser().absolute()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"cache is {f'disk:{folder}'!r}: {reason(error)}, expected a folder that takes files"
        ) from error
    return path


KIND = CacheKind(
    "disk",
    ("disk:FOLDER",),
    lambda choice: DiskCache(check_folder(choice.folder), resident=choice.resident),
    lambda choice: f"in files in {choice.folder}, {choice.resident.words}",
    layout=lambda size: "paged",
    in_folder=True,
)
