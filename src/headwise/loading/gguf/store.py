"""GGUF files, converted once: a cache of model folders that Transformers opens at once.

Reading a GGUF takes Transformers 16-20 s for a 135M model (it parses the vocabulary several
times), a safetensors folder of the same weights 0.2 s. An entry is named after the file's content,
so that a changed file never finds the old entry, and is written atomically. The content
is compared again after the conversion, so that an entry is of the content that it is named after.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from headwise.base.files import CACHE_VARIABLE, cache_folder, read_json
from headwise.base.memory import gib
from headwise.base.progress import Progress, silent
from headwise.base.written import remove_leftovers, written_whole
from headwise.errors import CapacityError, LoadError
from headwise.loading.gguf.content import digest, known_digest, stamp
from headwise.loading.gguf.conversion import float32_bytes, write_folder
from headwise.loading.gguf.packed import write_packed_folder

# 2: format 1 kept files whose tensors were missing or left over, and whose rotation was not read.
_FORMAT = 2
_RECORD = "headwise-gguf.json"
# A folder is as large as its weights; this much more is its vocabulary and configs.
_SLACK_BYTES = 64 * 2**20
# Of the file's own name: what is added to it stays below the 255 bytes that a name may have (143 on
# encrypted folders).
_NAME_BYTES = 80

Writer = Callable[[Path, Path, Progress], None]
# By what becomes of the weights: numbers of float32, or the file's own blocks.
_SUFFIX = {"float": "", "packed": "-packed"}
_WRITERS: dict[str, Writer] = {"float": write_folder, "packed": write_packed_folder}


def converted(
    file: Path,
    *,
    weights: str = "float",
    progress: Progress = silent,
    write: Writer | None = None,
) -> Path:
    """The model folder made from a GGUF file: weights, config and tokenizer.

    `weights` are "float", float32, or "packed", in the file's blocks.

    The first call converts (`write`, into a temporary sibling, then renamed); later ones only read
    the file once, to know that it is still the same. Processes that convert the same file at the
    same time wait for each other.

    Raises:
        LoadError: not a GGUF that Transformers can read, one that changed meanwhile, or the cache
            folder cannot be written.
        CapacityError: not enough room on the disk; says needed and available bytes.
    """
    before, known = stamp(file), known_digest(file, progress)
    write = write or _WRITERS[weights]
    entry = cache_folder("gguf") / f"{_short(file.stem)}-{known}{_SUFFIX[weights]}"
    if is_whole(entry):
        return entry
    import filelock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(entry.parent / f".{entry.name}.lock"):
            if is_whole(entry):
                return entry
            needed = float32_bytes(file) if weights == "float" else file.stat().st_size
            _make_room(file, entry, needed + _SLACK_BYTES)
            with written_whole(entry) as part:
                write(file, part, progress)
                if stamp(file) != before or digest(file, progress) != known:
                    raise LoadError(
                        f"{file} was changed while it was converted; give it again once it is "
                        "complete"
                    )
                _record(part)
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"cannot write the converted model to {entry.parent}: {error.strerror or error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return entry


def is_whole(entry: Path) -> bool:
    """Whether an entry holds every file that its record lists, each with its size: a model's."""
    import transformers

    try:
        record = read_json(entry / _RECORD)
        # Another version may dequantise or name things otherwise, so its entry is made again.
        made_by = (record["format"], record["transformers"])
        sizes = record["files"]
        return (
            made_by == (_FORMAT, transformers.__version__)
            and "config.json" in sizes
            and any(name.endswith(".safetensors") for name in sizes)
            and all((entry / name).stat().st_size == size for name, size in sizes.items())
        )
    except (LoadError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _make_room(file: Path, entry: Path, needed: int) -> None:
    """Remove what stands where the entry goes, then refuse a disk on which it does not fit."""
    remove_leftovers(entry)
    if entry.exists():
        shutil.rmtree(entry)
    free = shutil.disk_usage(entry.parent).free
    if needed > free:
        raise CapacityError(
            f"converting {file.name} needs {gib(needed)} of disk but {entry.parent} has "
            f"{gib(free)} free; make room or set {CACHE_VARIABLE} to another folder"
        )


def _record(folder: Path) -> None:
    """List every file with its size."""
    import transformers

    files = sorted(path for path in folder.iterdir() if path.is_file())
    record = {
        "format": _FORMAT,
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in files},
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _short(name: str) -> str:
    """A file's name, cut short: it is for people, the digest tells entries apart."""
    return os.fsencode(name)[:_NAME_BYTES].decode(errors="ignore")
