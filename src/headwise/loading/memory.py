"""Does a model fit? Counted from the weight files' headers, before anything is read."""

import json
import math
import struct
from collections.abc import Container
from pathlib import Path

import psutil
import torch

from headwise.errors import CapacityError, LoadError

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# A header is JSON about tensors; the safetensors format itself caps it at this size.
_HEADER_LIMIT = 100_000_000


def weight_bytes(folder: Path, dtype: torch.dtype | None, *, without: Container[str] = ()) -> int:
    """Bytes that a folder's weights take once loaded as `dtype` (None: as they are stored).

    Tensors named in `without` are not counted.

    Only floating-point tensors change their size: a quantised model's integers stay what they are.

    Raises:
        LoadError: a file that is not safetensors, or is cut short.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(file).items():
            if name in without:
                continue
            start, end = tensor["data_offsets"]
            if dtype is not None and tensor["dtype"] in _ITEM_BYTES:
                total += math.prod(tensor["shape"]) * dtype.itemsize
            else:
                total += end - start
    return total


def _header(file: Path) -> dict:
    """The tensors of one safetensors file, without their data: name to dtype, shape, offsets."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _HEADER_LIMIT):
                raise LoadError(f"{file} is not a safetensors file, or is cut short")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except LoadError:
        raise
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} is not a readable safetensors file: {error}") from error
    if 8 + length + end > size:
        raise LoadError(
            f"{file} is cut short: {size} bytes of {8 + length + end}; download it again"
        )
    return header


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse what would not fit in the device's free memory; `needed` in bytes.

    Raises:
        CapacityError: says the needed and the available bytes.
    """
    available = available_bytes(device)
    if needed > available:
        raise CapacityError(
            f"{what} needs {gib(needed)} but {gib(available)} of memory is available on {device}; "
            "use a smaller model, --dtype bfloat16 or a shorter context"
        )


def available_bytes(device: torch.device) -> int:
    """Bytes that are free on a device: the driver's count for CUDA, the system's else."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def gib(count: int) -> str:
    """A byte count for people.

    >>> gib(3 * 2**30 // 2), gib(538_090_408), gib(92_160), gib(640)
    ('1.50 GiB', '513 MiB', '90 KiB', '640 bytes')
    """
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.0f} MiB"
    if count >= 2**13:
        return f"{count / 2**10:.0f} KiB"
    return f"{count} bytes"
