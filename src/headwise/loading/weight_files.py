"""The safetensors files of a model folder: which they are, and what their weights take."""

import math
from collections.abc import Container
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from headwise.base.files import kind_of, one_line, read_json
from headwise.base.tensor_files import read_header
from headwise.errors import LoadError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")


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


def weight_bytes(folder: Path, dtype: torch.dtype | None, *, without: Container[str] = ()) -> int:
    """Bytes that a folder's weights take once loaded as `dtype` (None: as they are stored).

    They are counted from the files' headers, before anything else is read. Tensors named in
    `without` are not counted. Only floating-point tensors change their size: a quantised model's
    integers stay what they are.

    Raises:
        LoadError: a file that is not safetensors, or is cut short.
    """
    total = 0
    for file in weight_files(folder) or sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if name in without:
                continue
            start, end = tensor["data_offsets"]
            if dtype is not None and tensor["dtype"] in _FLOATS:
                total += math.prod(tensor["shape"]) * dtype.itemsize
            else:
                total += end - start
    return total


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
