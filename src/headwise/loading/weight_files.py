"""The safetensors files of a model folder: which they are, and what their weights take."""

import json
import math
import struct
from collections.abc import Container, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwise.base.files import kind_of, one_line, read_json, require_file
from headwise.errors import LoadError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What is written: the dtype as safetensors has it, and a shape.
Shaped = tuple[str, tuple[int, ...]]
_DTYPES = {"U8": torch.uint8, "F32": torch.float32}
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


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, without their data: name to dtype, shape and offsets.

    safetensors itself checks the header: types, shapes, and that the tensors fill the file without
    a gap or an overlap.

    Raises:
        LoadError: a file that is not safetensors, or is cut short.
    """
    require_file(file)
    with one_line(f"{file} is not a readable safetensors file"), file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size - 8:
            raise LoadError(f"{file} is not a safetensors file, or is cut short")
        open_weights(file)
        header = json.loads(stream.read(length), object_pairs_hook=_each_once)
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


def write_weights(file: Path, shapes: Mapping[str, Shaped], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file a tensor at a time: `tensors` in the order of `shapes`.

    safetensors itself wants all of them in memory.
    """
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins at a multiple of 64
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            right = tuple(tensor.shape) == shape and tensor.dtype == _DTYPES[dtype]
            assert right, f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            stream.write(tensor.contiguous().numpy().data)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands in it twice")
    return members
