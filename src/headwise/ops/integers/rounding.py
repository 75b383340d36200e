"""Rows as integers with scales: what a quantised cache holds.

In 8 bits a row has one scale, its largest magnitude over 127. In 4 bits every 32 elements have one,
after a rotation that spreads the channels that stand out over all others: keys in particular have
some, and 16 levels leave little for the rest beside them (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456). A rotation leaves the products of queries and keys as they are, if both are rotated.
Of six scales that reach the largest element, or nearly, the one with the smallest error is taken.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
# Elements that share a scale in 4 bits (csrc/sizes.h has the same).
INT4_GROUP = 32


# Of the scale that reaches the largest element (csrc/quantize.h has the same).
_NARROWER = (1.0, 0.9, 0.8)


def row_bytes(dim: int, bits: Bits) -> int:
    """Bytes of a row of `dim` elements as integers with their scales.

    >>> row_bytes(128, 8), row_bytes(128, 4)
    (132, 80)
    """
    return dim * bits // 8 + 4 * (1 if bits == 8 else -(-dim // INT4_GROUP))


def quantize(rows: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows [..., D], as `headwise.ops.quantize` gives them."""
    wide = rows.float()
    if bits == 8:
        scales = wide.abs().amax(dim=-1, keepdim=True) / 127
        return _divided(wide, scales).round().nan_to_num(0).to(torch.int8), scales
    dim = wide.shape[-1]
    grouped = _grouped(rotate(wide)).unsqueeze(-2)  # [..., groups, 1, 32]
    scales = _candidates(grouped)  # [..., groups, 6, 1]
    levels = _divided(grouped, scales).round().clamp(-8, 7)
    best = (levels * scales - grouped).square().sum(-1, keepdim=True).argmin(-2, keepdim=True)
    scales = scales.gather(-2, best)
    levels = levels.take_along_dim(best, -2).squeeze(-2).nan_to_num(0)
    levels = levels.to(torch.int8).flatten(-2)[..., :dim]
    low, high = levels[..., ::2] & 15, levels[..., 1::2] << 4
    return (low | high).view(torch.uint8), scales.flatten(-3)


def dequantize(integers: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The float32 rows [..., D] that `quantize` made integers and scales of.

    >>> dequantize(torch.tensor([[64, -127]], dtype=torch.int8), torch.tensor([[0.01]]), 8)
    tensor([[ 0.6400, -1.2700]])
    """
    if bits == 8:
        return integers * scales
    if integers.shape[-1] == 0:
        return integers.float()
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


def _candidates(grouped: Tensor) -> Tensor:
    """Scales [..., 6, 1] of groups [..., 1, 32]: the largest element is 7, or -8, or beyond."""
    low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
    top = torch.maximum(-low, high)
    outermost = torch.where(-low > high, top, -top) / 8
    parts = [base * part for part in _NARROWER for base in (top / 7, outermost)]
    return torch.cat(parts, dim=-2)


def _divided(rows: Tensor, scales: Tensor) -> Tensor:
    return rows / torch.where(scales != 0, scales, 1)
