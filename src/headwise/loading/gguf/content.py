"""A file's content by its digest, which is kept: a large file is not read again to know it."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from headwise.base.files import cache_folder, one_line, read_json
from headwise.base.progress import Progress
from headwise.base.written import write_whole
from headwise.errors import LoadError, OptionError

# A file that changed so lately may change again without another time of its last change.
_SETTLED_NS = 2 * 10**9

Stamp = tuple[int, int, int, int]


def stamp(file: Path) -> Stamp:
    """What changes when a file is written to or replaced, even by what is put back later."""
    with one_line(f"{file} cannot be read"):
        stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def known_digest(file: Path, progress: Progress) -> str:
    """The digest of a file's content; of one that has not changed since it was read, as kept."""
    before, record = stamp(file), _record(file)
    with suppress(LoadError, KeyError):
        kept = read_json(record)
        if kept["stamp"] == list(before) and isinstance(kept["digest"], str):
            return str(kept["digest"])
    made = digest(file, progress)
    settled = time.time_ns() - max(before[2:]) > _SETTLED_NS
    if settled and stamp(file) == before:
        # where it cannot be kept, the file is read again next time
        with suppress(OSError, OptionError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps({"stamp": before, "digest": made}).encode())
    return made


def digest(file: Path, progress: Progress) -> str:
    """16 hex digits of the file's sha256: 64 bits tell any two files of one user apart."""
    sha = hashlib.sha256()
    with one_line(f"{file} cannot be read"), file.open("rb") as stream:
        total = file.stat().st_size
        while block := stream.read(16 * 2**20):
            sha.update(block)
            progress(f"reading {file.name}", stream.tell(), total)
    return sha.hexdigest()[:16]


def _record(file: Path) -> Path:
    name = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder("digests") / f"{name}.json"
