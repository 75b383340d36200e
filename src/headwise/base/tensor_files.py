"""One safetensors file: its header checked before anything is allocated, and how one is written."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwise.base.files import one_line, require_file
from headwise.errors import LoadError

# What is written: the dtype as safetensors has it, and a shape.
Shaped = tuple[str, tuple[int, ...]]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, without their data: name to dtype, shape and offsets.

    Raises:
        LoadError: as `read_head`.
    """
    return read_head(file)[0]


def read_head(file: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The tensors of a safetensors file, what it says of itself, and the byte where data begins.

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
    about = header.pop("__metadata__", None) or {}
    return dict(header), dict(about), 8 + length


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


def header_of(
    shapes: Mapping[str, Shaped], *, alignment: int, about: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the data, which begins at a multiple of `alignment`.

    about: what the file says of itself, under `__metadata__`.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": about}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


def write_weights(file: Path, shapes: Mapping[str, Shaped], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file a tensor at a time: `tensors` in the order of `shapes`.

    safetensors itself wants all of them in memory.
    """
    with file.open("wb") as stream:
        stream.write(header_of(shapes, alignment=64))
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            right = tuple(tensor.shape) == shape and tensor.dtype == DTYPES[dtype]
            assert right, f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            stream.write(tensor.contiguous().numpy().data)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands in it twice")
    return members
