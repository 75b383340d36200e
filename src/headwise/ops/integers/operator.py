"""`quantize`: rows as integers, by the fastest backend that offers it."""

from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.backend import choose_offer
from headwise.ops.integers.rounding import Bits


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
    integers, scales = choose_offer("quantize", None, rows, bits)(rows, bits)
    return integers, scales
