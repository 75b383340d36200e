"""Does a model fit? Counted from the weight files' headers, before anything is read."""

import math
from collections.abc import Container
from pathlib import Path

import psutil
import torch

from headwise.errors import CapacityError
from headwise.loading.weight_files import read_header, weight_files

_FLOATS = ("F64", "F32", "F16", "BF16")


def weight_bytes(folder: Path, dtype: torch.dtype | None, *, without: Container[str] = ()) -> int:
    """Bytes that a folder's weights take once loaded as `dtype` (None: as they are stored).

    Tensors named in `without` are not counted.

    Only floating-point tensors change their size: a quantised model's integers stay what they are.

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
