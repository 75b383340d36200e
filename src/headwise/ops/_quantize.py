"""`quantize`: rows as integers, by the C++ kernels where they may run."""

from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops import _cpu, _integers
from headwise.ops._integers import Bits


def quantize(rows: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows [..., D].

    In 8 bits int8 [..., D] and float32 [..., 1]. In 4 bits, of the rotated rows, uint8 [..., D/2],
    two a byte, the low half first, and float32 [..., ceil(D/32)].

    >>> import torch
    >>> integers, scales = quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0]]), 8)
    >>> integers.tolist(), scales.shape
    ([[64, -127, 32, 0]], torch.Size([1, 1]))

    Raises:
        ShapeError: other bits, rows of no elements, or of an odd number in 4 bits.
    """
    if rows.ndim == 0 or rows.shape[-1] == 0:
        raise ShapeError(f"rows have shape {list(rows.shape)}, expected [..., D], D from 1")
    if bits not in (4, 8):
        raise ShapeError(f"bits is {bits!r}, expected 4 or 8")
    if bits == 4 and rows.shape[-1] % 2:
        raise ShapeError(f"rows of {rows.shape[-1]} elements, expected an even number in 4 bits")
    if _cpu.quantizes(rows):
        if rows.ndim == 4:
            return _cpu.quantize(rows, bits)
        integers, scales = _cpu.quantize(rows.reshape(1, 1, -1, rows.shape[-1]), bits)
        before = rows.shape[:-1]
        return (
            integers.view(*before, integers.shape[-1]),
            scales.view(*before, scales.shape[-1]),
        )
    return _integers.quantize(rows, bits)
