"""A folder of remembered tokens: blocks of 256, each a cache file that names the one before it.

    FOLDER/<origin>/<start>-<count>-<parent>-<key>-<rows or whole>.safetensors

A block's key is a hash of its tokens and of its parent's key, so that a name says which text leads
to it; a whole one has what layers keep beside rows, too. Hashes find a block; its tokens are
compared before it is used. Files are written whole and never changed, so that processes need no
locks: what is gone is read again.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from torch import Tensor

from headwise.base.files import cache_folder
from headwise.errors import HeadwiseError, LoadError
from headwise.stored.file import PART, CacheFile, Contents, write
from headwise.stored.layout import PAGE
from headwise.stored.origin import Origin

BLOCK = 4 * PAGE
_FIRST = "0" * 32  # the parent of a text's first block
_NAME = re.compile(r"(\d{8,12})-(\d{4})-([0-9a-f]{32})-([0-9a-f]{32})-(rows|whole)\.safetensors")
# Blocks of other texts that go on from the same one, of which so many are looked into.
_MOST_OTHERS = 16


@dataclass(frozen=True)
class Entry:
    """A file of the folder, by its name."""

    path: Path
    start: int
    count: int
    parent: str
    key: str
    fixed: bool

    @classmethod
    def read(cls, path: Path) -> "Entry | None":
        """What a name says; None where it is not one of ours."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        start, count, parent, key, kind = match.groups()
        return cls(path, int(start), int(count), parent, key, kind == "whole")


@dataclass(frozen=True)
class Match:
    """A block that is open, of which `count` tokens are those that were looked for."""

    file: CacheFile
    count: int

    @property
    def whole(self) -> bool:
        """Whether all its tokens are."""
        return self.count == self.file.contents.tokens.shape[1]


@dataclass(frozen=True)
class Found:
    """What is remembered of a text: for each block of 256 tokens the files that begin as it does.

    damaged: what was found and could not be used, in words.
    """

    levels: tuple[tuple[Match, ...], ...]
    damaged: tuple[str, ...] = ()

    @property
    def reach(self) -> int:
        """Tokens of the text whose rows are there."""
        if not self.levels:
            return 0
        return (len(self.levels) - 1) * BLOCK + max(match.count for match in self.levels[-1])

    @property
    def points(self) -> set[int]:
        """Lengths after which what layers keep beside rows is there."""
        return {
            level * BLOCK + match.count
            for level, matches in enumerate(self.levels)
            for match in matches
            if match.whole and match.file.has_fixed
        }

    def take(self, length: int, *, fixed: bool) -> list[Match]:
        """The blocks of the first `length` tokens; with `fixed` the last is a whole one with it."""
        taken = []
        for level in range(-(-length // BLOCK)):
            count = min(BLOCK, length - level * BLOCK)
            last = fixed and level * BLOCK + count == length
            usable = (
                match
                for match in self.levels[level]
                if match.count >= count
                and not (
                    last and not (match.whole and match.count == count and match.file.has_fixed)
                )
            )
            taken.append(replace(next(usable), count=count))
        return taken


class Store:
    """The blocks of one model in a folder.

    Args:
        folder: of all models.
        origin: the model.
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.root, self.origin = folder, origin
        self.folder = folder / origin.key

    def find(self, tokens: Tensor) -> Found:
        """What is there of a text [L]."""
        children: dict[tuple[int, str], list[Entry]] = {}
        for entry in entries_in(self.folder):
            children.setdefault((entry.start, entry.parent), []).append(entry)
        levels, damaged = list[tuple[Match, ...]](), list[str]()
        for start, rest, parent, _ in _blocks(tokens):
            known, others = list[Entry](), list[Entry]()
            for entry in children.get((start, parent), ()):
                same = entry.count <= len(rest) and entry.key == _key(parent, rest[: entry.count])
                (known if same else others).append(entry)
            known.sort(key=lambda entry: -entry.count)
            matches = self._open([*known, *others[:_MOST_OTHERS]], rest, damaged)
            if not matches:
                break
            levels.append(tuple(matches))
            if matches[0].count < BLOCK:
                break
        return Found(tuple(levels), tuple(damaged))

    def _open(self, entries: Iterable[Entry], tokens: Tensor, damaged: list[str]) -> list[Match]:
        """Those that begin with `tokens`, the longest first."""
        matches = []
        for entry in entries:
            try:
                file = CacheFile(entry.path)
            except LoadError as error:
                if entry.path.exists():
                    damaged.append(str(error))
                    forget_damaged(entry.path, error)
                continue
            held = file.contents
            own = held.tokens[0] if len(held.tokens) == 1 else tokens[:0]
            place = (held.origin, held.start, held.parent)
            if place == (self.origin, entry.start, entry.parent) and len(own):
                count = _common(own, tokens)
                if count:
                    matches.append(Match(file, count))
        return sorted(matches, key=lambda match: -match.count)

    def touch(self, tokens: Tensor) -> None:
        """Note that the blocks of a text were used now, the first of them last."""
        keys = {(start, parent, key) for start, _, parent, key in _blocks(tokens)}
        for entry in sorted(entries_in(self.folder), key=lambda entry: -entry.start):
            if (entry.start, entry.parent, entry.key) in keys:
                _ignoring_faults(os.utime, entry.path)

    def missing(self, tokens: Tensor, *, fixed: bool) -> list[tuple[int, int, str]]:
        """The blocks of a text [L] that are not there: begin, end and parent of each.

        fixed: whether the last has to have what layers keep beside rows.
        """
        here = {(e.start, e.count, e.parent, e.key, e.fixed) for e in entries_in(self.folder)}
        missing = []
        for start, rest, parent, key in _blocks(tokens):
            last = start + BLOCK >= len(tokens)
            kinds = (True,) if fixed and last else (True, False)
            if not any((start, len(rest), parent, key, kind) in here for kind in kinds):
                missing.append((start, start + len(rest), parent))
        return missing

    def put(
        self,
        contents: Contents,
        pages: Iterable[bytes | bytearray],
        fixed: Mapping[str, Tensor],
    ) -> None:
        """Write a block, whose tokens are [1, n], and remove shorter ones that it contains.

        Raises:
            OSError: it cannot be written; nothing is left.
        """
        tokens = contents.tokens[0]
        key = _key(contents.parent, tokens)
        kind = "whole" if fixed else "rows"
        name = f"{contents.start:08d}-{len(tokens):04d}-{contents.parent}-{key}-{kind}.safetensors"
        make_private(self.root)
        make_private(self.folder)
        write(self.folder / name, contents, pages, fixed)
        for entry in entries_in(self.folder):
            within = (entry.start, entry.parent) == (contents.start, contents.parent)
            shorter = entry.count < len(tokens) or (entry.count == len(tokens) and bool(fixed))
            same = within and entry.key == _key(entry.parent, tokens[: entry.count])
            if same and shorter and not entry.fixed:
                forget([entry])


def own_folder() -> Path:
    """Where the commands store, in the user's cache folder."""
    return cache_folder("remembered")


def entries_in(folder: Path) -> list[Entry]:
    """The blocks in the folder of one model; none where it is not there."""
    try:
        names = os.listdir(folder)
    except OSError:  # not there, or not to be read
        return []
    return [entry for name in names if (entry := Entry.read(folder / name)) is not None]


def touch(matches: Iterable[Match]) -> None:
    """Note that blocks were used now; one that is gone, or may not be written, stays so."""
    for match in matches:
        _ignoring_faults(os.utime, match.file.path)


def forget_damaged(path: Path, error: BaseException | None) -> bool:
    """Remove a block that is not what was written; False of one that only cannot be read now."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, HeadwiseError):
            return False
        error = error.__cause__
    _ignoring_faults(os.unlink, path)
    return True


def forget(entries: Iterable[Entry]) -> None:
    """Remove blocks; one that is gone is gone, one that may not be removed stays."""
    for entry in entries:
        _ignoring_faults(os.unlink, entry.path)


@dataclass(frozen=True)
class Used:
    """A block, its bytes and when it was used last, in seconds since 1970."""

    entry: Entry
    nbytes: int
    last: float


def all_blocks(root: Path) -> list[Used]:
    """The blocks of all models in a folder."""
    used = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for entry in entries_in(folder) if len(folder.name) == 32 else ():
            try:
                state = entry.path.stat()
            except OSError:
                continue
            used.append(Used(entry, state.st_size, state.st_mtime))
    return used


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds of one model; without `origin` where no block can be read."""

    id: str
    origin: Origin | None
    blocks: tuple[Used, ...]

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(used.nbytes for used in self.blocks)

    @property
    def tokens(self) -> int:
        """Of all blocks."""
        return sum(used.entry.count for used in self.blocks)

    @property
    def last(self) -> float:
        """When one was used last, in seconds since 1970."""
        return max(used.last for used in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; sizes in bytes."""
        return {
            "id": self.id,
            **({} if self.origin is None else self.origin.as_json()),
            "tokens": self.tokens,
            "blocks": len(self.blocks),
            "bytes": self.nbytes,
            "last_used": self.last,
        }


def stored_models(root: Path) -> list[StoredModel]:
    """What a folder holds, one of each model, the last used first."""
    models: dict[str, list[Used]] = {}
    for used in all_blocks(root):
        models.setdefault(used.entry.path.parent.name, []).append(used)
    found = [
        StoredModel(name, _origin_of(blocks), tuple(blocks)) for name, blocks in models.items()
    ]
    return sorted(found, key=lambda each: -each.last)


def _origin_of(blocks: Iterable[Used]) -> Origin | None:
    for used in blocks:
        try:
            return CacheFile(used.entry.path).contents.origin
        except LoadError:
            continue
    return None


def make_room(root: Path, limit: int) -> int:
    """Remove the blocks that were not used for longest until `limit` bytes are left; how many went.

    Of a text, the last blocks go first, and what killed processes have left goes too.
    """
    blocks = sorted(all_blocks(root), key=lambda used: (used.last, -used.entry.start))
    total, gone = sum(used.nbytes for used in blocks), 0
    for used in blocks:
        if total <= limit:
            break
        forget([used.entry])
        total -= used.nbytes
        gone += 1
    for folder in {used.entry.path.parent for used in blocks}:
        remove_parts(folder)
    return gone


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed have left of files in a folder."""
    for part in folder.glob(f"{PART}*"):
        owner = part.name.removeprefix(PART).partition("-")[0]
        number = int(owner) if owner.isdecimal() and len(owner) < 10 else os.getpid()
        if number != os.getpid() and not psutil.pid_exists(number):
            _ignoring_faults(os.unlink, part)


def make_private(folder: Path) -> None:
    """Make a folder that its user alone may look into; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def _ignoring_faults(function: Callable[[Path], None], path: Path) -> None:
    with suppress(OSError):
        function(path)


def _common(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _blocks(tokens: Tensor) -> Iterator[tuple[int, Tensor, str, str]]:
    """The blocks of a text: where each begins, its tokens, its parent's key and its own."""
    parent = _FIRST
    for start in range(0, len(tokens), BLOCK):
        rest = tokens[start : start + BLOCK]
        key = _key(parent, rest)
        yield start, rest, parent, key
        parent = key


def _key(parent: str, tokens: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(parent.encode() + tokens.to(torch.int64).numpy().tobytes())
