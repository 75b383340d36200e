"""The safetensors files of a model folder: which they are, and what their headers say."""

import json
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from headwise.base.files import MOST_JSON, kind_of, one_line, read_json, require_file
from headwise.errors import LoadError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as Transformers chooses them; none where none are.

    Raises:
        LoadError: an index that cannot be read, or that names files which are not there or not in
            the folder.
    """
    if kind_of(folder / WHOLE) != "none":
        return [folder / WHOLE]
    if kind_of(folder / INDEX) != "none":
        return [folder / name for name in _shards(folder)]
    return []


def _shards(folder: Path) -> list[str]:
    """The names in an index, each in the folder and there."""
    index = folder / INDEX
    with one_line(f"{index} is not a readable safetensors index"):
        names = set(read_json(index)["weight_map"].values())
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or _leads_out(name):
            raise LoadError(
                f"{index} names {str(name)[:200]!r} as a weight file, expected the name of a "
                ".safetensors file in the same folder"
            )
    missing = [name for name in sorted(names) if kind_of(folder / name) == "none"]
    if missing:
        raise LoadError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; "
            "download it again"
        )
    return sorted(names)


def _leads_out(name: str) -> bool:
    """Whether a name in an index may be of a file outside the folder, on any system."""
    return any(
        ".." in pure.parts or bool(pure.anchor)
        for pure in (PurePosixPath(name), PureWindowsPath(name))
    )


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, without their data: name to dtype, shape and offsets.

    safetensors itself checks the header: types, shapes, and that the tensors fill the file without
    a gap or an overlap.

    Raises:
        LoadError: a file that is not safetensors, or is cut short.
    """
    require_file(file)
    with one_line(f"{file} is not a readable safetensors file"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MOST_JSON):
                raise LoadError(f"{file} is not a safetensors file, or is cut short")
            content = stream.read(length)
        open_weights(file)
        header = json.loads(content, object_pairs_hook=_each_once)
        header.pop("__metadata__", None)
        return dict(header)


def open_weights(file: Path) -> Any:
    """A safetensors file whose tensors are read one by one, as PyTorch's.

    Raises:
        LoadError: a file that is not safetensors, or is cut short.
    """
    require_file(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        cut = "; it is cut short: download it again" if "incomplete" in str(error) else ""
        raise LoadError(f"{file} is not a readable safetensors file: {error}{cut}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found
