"""Rows as integers with scales: what a quantised cache holds.

In 8 bits a row has one scale, its largest magnitude over 127. In 4 bits every 32 elements have one,
after a rotation that spreads the channels that stand out over all others: keys in particular have
some, and 15 levels leave little for the rest beside them (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456). A rotation leaves the products of queries and keys as they are, if both are rotated.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from headwise.errors import ShapeError

Bits = Literal[4, 8]
# Elements that share a scale in 4 bits (csrc/attend_args.h has the same).
INT4_GROUP = 32


def quantize(rows: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows [..., D]: in 8 bits int8 [..., D] and float32 [..., 1]; in 4 bits
    uint8 [..., D/2], two a byte, the low half first, and float32 [..., ceil(D/32)].

    >>> integers, scales = quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0]]), 8)
    >>> integers.tolist(), scales.shape
    ([[64, -127, 32, 0]], torch.Size([1, 1]))

    Raises:
        ShapeError: D is odd, in 4 bits.
    """
    wide = rows.float()
    if bits == 8:
        scales = wide.abs().amax(dim=-1, keepdim=True) / 127
        return _divided(wide, scales).round().to(torch.int8), scales
    dim = wide.shape[-1]
    if dim % 2:
        raise ShapeError(f"rows of {dim} elements, expected an even number in 4 bits")
    grouped = _grouped(rotate(wide))
    scales = grouped.abs().amax(dim=-1, keepdim=True) / 7
    levels = _divided(grouped, scales).round().to(torch.int8).flatten(-2)[..., :dim]
    low, high = levels[..., ::2] & 15, levels[..., 1::2] << 4
    return (low | high).view(torch.uint8), scales.squeeze(-1)


def dequantize(integers: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The float32 rows [..., D] that `quantize` made integers and scales of.

    >>> row = torch.tensor([[0.5, -1.0, 0.25, 0.0]])
    >>> dequantize(*quantize(row, 8), bits=8)
    tensor([[ 0.5039, -1.0000,  0.2520,  0.0000]])
    """
    if bits == 8:
        return integers * scales
    signed = integers.view(torch.int8)
    levels = torch.stack([signed << 4 >> 4, signed >> 4], dim=-1).flatten(-2)
    grouped = _grouped(levels.float()) * scales.unsqueeze(-1)
    return rotate(grouped.flatten(-2)[..., : levels.shape[-1]])


def rotate(rows: Tensor) -> Tensor:
    """Multiply rows [..., D] by an orthogonal, symmetric matrix: twice is as before.

    A Hadamard matrix for each block of D & -D elements, the largest power of two that divides D.

    >>> rotate(rotate(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    tensor([1., 2., 3., 4.])
    """
    block = rows.shape[-1] & -rows.shape[-1]
    matrix = _hadamard(block).to(rows)
    return (rows.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, orthonormal."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / size**0.5


def _grouped(rows: Tensor) -> Tensor:
    """[..., ceil(D/32), 32], zeros at the end."""
    missing = -rows.shape[-1] % INT4_GROUP
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(-1, (-1, INT4_GROUP))


def _divided(rows: Tensor, scales: Tensor) -> Tensor:
    return rows / torch.where(scales > 0, scales, 1)
