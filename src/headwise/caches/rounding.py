"""How tokens become the integers and scales that a cache holds."""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops import Bits, quantize


def check_bits(bits: Any) -> None:
    """Raise `ShapeError` unless rows can be rounded to so many bits."""
    if bits not in (4, 8):
        raise ShapeError(f"bits is {bits!r}, expected 4 or 8")


def rounded(tokens: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Integers and scales; of MLA without rotated dims, rope keys of no elements."""
    if tokens.shape[3] > 0:
        with torch.no_grad():
            return quantize(tokens, bits)
    scales = tokens.new_zeros(*tokens.shape[:3], 1 if bits == 8 else 0, dtype=torch.float32)
    return tokens.to(torch.int8 if bits == 8 else torch.uint8), scales
