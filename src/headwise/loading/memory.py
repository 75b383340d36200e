"""What weights take once loaded, counted from their files' headers before anything is read."""

import math
from collections.abc import Container
from pathlib import Path

import torch

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
