"""One cache file: safetensors whose pages are mapped, and whose every byte has a checksum.

Its tensors are `pages` (uint8 [pages, bytes of a page], see `PageLayout`), `checksums` of each,
`tokens` and `real` [B, L], `table` [B, pages of a sequence], and what layers keep beside rows, as
`3.first`. What it is of, and how a page is divided, is JSON in the header. A digest covers the
header and the small tensors; the checksums cover the rest.
"""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from headwise.base.files import one_line
from headwise.base.mapped import ALIGNMENT, map_part
from headwise.base.tensor_files import DTYPES, Shaped, header_of, read_head
from headwise.errors import LoadError
from headwise.stored.layout import NAMES, PAGE, PageLayout
from headwise.stored.origin import Origin

FORMAT = 1
# How files begin that are being written, before the number of the process.
PART = ".headwise-part-"
_HEAD, _DIGEST = "headwise_cache", "digest"
_CHECKSUM = 16  # bytes of one
_SMALL = ("checksums", "tokens", "real", "table")


@dataclass(frozen=True)
class Contents:
    """What a cache file says that it holds.

    Args:
        origin: the model.
        layers: what each layer keeps, as plain data: {"kind": "rows"} and so on.
        layout: how their rows lie in a page.
        tokens: int32 [B, L], what the cache has read, padding included.
        real: bool [B, L], where a token is not padding.
        table: int32 [B, pages], the pages of each sequence.
        start: tokens before these, in files of other blocks.
        parent: the key of the block before this one.
        made_by: versions.
    """

    origin: Origin
    layers: tuple[dict[str, Any], ...]
    layout: PageLayout
    tokens: Tensor
    real: Tensor
    table: Tensor
    start: int = 0
    parent: str = ""
    made_by: Mapping[str, str] | None = None

    def head(self, fixed: Mapping[str, str]) -> str:
        """The JSON of the header; `fixed` are the checksums of tensors by name."""
        return json.dumps(
            {
                "format": FORMAT,
                "made_by": dict(self.made_by or {}),
                "origin": self.origin.as_json(),
                "layers": self.layers,
                "rows": self.layout.as_json(),
                "start": self.start,
                "parent": self.parent,
                "fixed": fixed,
            }
        )


def write(
    path: Path,
    contents: Contents,
    pages: Iterable[bytes | bytearray],
    fixed: Mapping[str, Tensor],
) -> None:
    """Write a cache file by way of a temporary sibling; only its user may read it.

    pages: each of `contents.layout.page_bytes`, as many as the table names. fixed: what layers keep
    beside rows.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    layout = contents.layout
    count = int(contents.table.max()) + 1 if contents.table.numel() else 0
    small = {
        "checksums": torch.zeros(count, _CHECKSUM, dtype=torch.uint8),
        "tokens": contents.tokens.to(torch.int32),
        "real": contents.real.to(torch.uint8),
        "table": contents.table.to(torch.int32),
    }
    tensors = {name: each.detach().cpu().contiguous() for name, each in fixed.items()}
    head = contents.head({name: _checksum(_bytes(each)).hex() for name, each in tensors.items()})
    shapes: dict[str, Shaped] = {"pages": ("U8", (count, layout.page_bytes))}
    shapes |= {n: (NAMES[t.dtype], tuple(t.shape)) for n, t in {**small, **tensors}.items()}
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{PART}{os.getpid()}-")  # 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_header(shapes, head, "0" * 2 * _CHECKSUM))
            for index, page in enumerate(pages):
                assert len(page) == layout.page_bytes
                checksum = _checksum(page)
                small["checksums"][index] = torch.frombuffer(bytearray(checksum), dtype=torch.uint8)
                stream.write(page)
            for tensor in (*small.values(), *tensors.values()):
                stream.write(_bytes(tensor))
            stream.seek(0)
            stream.write(_header(shapes, head, _digest(head, small)))
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


class CacheFile:
    """A cache file that is open: its header and small tensors are read, and found to be whole.

    Raises:
        LoadError: it is not a cache file, is of another format, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._says():
            header, about, self._begin = read_head(path)
            if _HEAD not in about:
                raise LoadError(f"{path} is a safetensors file, and not a cache of headwise")
            with self._open() as file:
                self._size = os.fstat(file).st_size
                self._header = header
                small = {name: self._read(file, name) for name in _SMALL}
            if about.get(_DIGEST) != _digest(about[_HEAD], small):
                raise LoadError("its header or its tokens are damaged")
            self._take(json.loads(about[_HEAD]), small)

    @contextmanager
    def _says(self) -> Iterator[None]:
        with one_line(f"{self.path} is not a readable cache file"):
            try:
                yield
            except LoadError as error:
                if str(self.path) in str(error):
                    raise
                raise LoadError(f"{self.path}: {error}") from error

    def _take(self, head: Any, small: Mapping[str, Tensor]) -> None:
        if head["format"] != FORMAT:
            raise LoadError(f"its format is {head['format']!r}, this version reads {FORMAT}")
        tokens, real, table = small["tokens"], small["real"], small["table"]
        checksums, layout = small["checksums"], PageLayout.read(head["rows"])
        whole = (
            tokens.ndim == real.ndim == table.ndim == checksums.ndim == 2
            and tokens.shape == real.shape
            and tokens.shape[0] * tokens.shape[1] > 0
            and table.shape == (tokens.shape[0], -(-tokens.shape[1] // PAGE))
            and checksums.shape[1] == _CHECKSUM
            and len(checksums) <= table.numel()
            and self._shape("pages") == (len(checksums), layout.page_bytes)
            and 0 <= int(table.min()) <= int(table.max()) < len(checksums)
        )
        if not whole or int(head["start"]) < 0:
            raise LoadError("its tensors do not fit one another")
        self.contents = Contents(
            origin=Origin.read(head["origin"]),
            layers=tuple(dict(layer) for layer in head["layers"]),
            layout=layout,
            tokens=tokens.long(),
            real=real.bool(),
            table=table,
            start=int(head["start"]),
            parent=str(head["parent"]),
            made_by=dict(head["made_by"]),
        )
        self.pages = len(checksums)
        self._checksums = [bytes(each.numpy().data) for each in checksums]
        self._fixed = {str(name): str(checksum) for name, checksum in head["fixed"].items()}

    def map(self, memory: mmap.mmap, begin: int, first: int, count: int) -> None:
        """Put `count` pages from `first` on at `begin` of reserved memory, and verify them.

        Raises:
            LoadError: a page is not what was written.
        """
        size = self.contents.layout.page_bytes
        if not (first >= 0 and count >= 0 and first + count <= self.pages):
            raise LoadError(f"{self.path} has {self.pages} pages, not {first + count}")
        offset = self._begin + self._header["pages"]["data_offsets"][0] + first * size
        with self._says(), self._open() as file:
            map_part(memory, begin, file, offset, count * size)
            view = memoryview(memory)
            for index in range(count):
                at = begin + index * size
                if _checksum(view[at : at + size]) != self._checksums[first + index]:
                    raise LoadError(f"page {first + index} of {self.pages} is damaged")

    @property
    def has_fixed(self) -> bool:
        """Whether it holds what layers keep beside rows."""
        return bool(self._fixed)

    def fixed(self) -> dict[str, Tensor]:
        """What layers keep beside rows, verified.

        Raises:
            LoadError: a tensor is not what was written.
        """
        tensors = {}
        with self._says(), self._open() as file:
            for name, checksum in self._fixed.items():
                tensors[name] = self._read(file, name)
                if _checksum(_bytes(tensors[name])).hex() != checksum:
                    raise LoadError(f"{name} is damaged")
        return tensors

    @contextmanager
    def _open(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield file
        finally:
            os.close(file)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def _read(self, file: int, name: str) -> Tensor:
        """One tensor, after a look at whether the file has it."""
        entry = self._header[name]
        dtype, shape = DTYPES[entry["dtype"]], self._shape(name)
        begin, end = entry["data_offsets"]
        size = math.prod(shape) * dtype.itemsize
        if not (begin >= 0 and begin + size == end and self._begin + end <= self._size):
            raise LoadError(f"{name} is not where the header says")
        data = bytearray(size)
        with os.fdopen(os.dup(file), "rb") as stream:
            stream.seek(self._begin + begin)
            if stream.readinto(data) != size:
                raise LoadError(f"{name} is cut short")
        return (
            torch.frombuffer(data, dtype=dtype).view(shape)
            if size
            else torch.empty(shape, dtype=dtype)
        )


def _header(shapes: Mapping[str, Shaped], head: str, digest: str) -> bytes:
    return header_of(shapes, alignment=ALIGNMENT, about={_HEAD: head, _DIGEST: digest})


def _digest(head: str, small: Mapping[str, Tensor]) -> str:
    parts = [head.encode(), *(_bytes(small[name]) for name in _SMALL)]
    return _checksum(b"".join(_checksum(part) for part in parts)).hex()


def _checksum(data: Any) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.flatten().view(torch.uint8).numpy().data
