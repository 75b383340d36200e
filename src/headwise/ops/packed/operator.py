"""Packed matrices: made, read, and multiplied, by the fastest that is there."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwise.errors import ShapeError
from headwise.ops.backend import choose_offer, faster
from headwise.ops.backend.cpu_step import compiled_packed
from headwise.ops.modes import needs_gradients
from headwise.ops.packed.formats import FORMATS, is_packed

# Of the range of 32 numbers: what lies outside is cut off. The best of these is taken.
_NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8)


def pack(rows: Tensor, order: Tensor | None = None) -> Tensor:
    """Rows of a GGUF file [F, blocks, bytes of a block] as a packed matrix, in `order` [n].

    >>> pack(torch.zeros(3, 2, 18, dtype=torch.uint8), torch.tensor([2, 0])).shape
    torch.Size([2, 2, 18])

    Raises:
        ShapeError: no blocks of a format that is known, or an order that is no vector of integers.
        IndexError: an index in it of no row.
    """
    _check(rows)
    _check_indices("order is", order, len(rows))
    packed: Tensor = choose_offer("pack", None, rows, order)(rows.contiguous(), order)
    return packed


def unpack(packed: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The numbers of a packed matrix [F,E], or of its `rows` [n]: [n,E] in `dtype`.

    In float32 they have the bits that the gguf package gives.

    >>> unpack(torch.zeros(16, 2, 18, dtype=torch.uint8), torch.float32).shape
    torch.Size([16, 64])

    Raises:
        ShapeError: no packed matrix, or rows that are no vector of integers.
        IndexError: an index below 0, or that of no row.
    """
    _check(packed)
    _check_indices("rows are", rows, len(packed))
    numbers: Tensor = choose_offer("unpack", None, packed, dtype, rows)(packed, dtype, rows)
    return numbers


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [...,E] by the transpose of a packed matrix [F,E], plus a bias [F]: [...,F].

    Where a kernel serves it, x is rounded to integers of 8 bits with a scale for each 32; so it is
    in what torch.compile makes. Elsewhere the matrix is made numbers first.

    >>> packed_linear(torch.ones(3, 32), round_blocks(torch.eye(32), 8), None).shape
    torch.Size([3, 32])
    """
    given = x, (packed,), (bias,)
    run = faster("linear", *given)
    if run is None and torch.compiler.is_compiling():
        run = compiled_packed(x, packed, bias)
    if run is not None:
        result: Tensor = run(*given)[0]
        return result
    if needs_gradients(x, *([] if bias is None else [bias])):
        differentiated: Tensor = _Product.apply(x, packed, bias)
        return differentiated
    return functional.linear(x, unpack(packed, x.dtype), bias)


class _Product(torch.autograd.Function):
    """A product that keeps the packed matrix, not its numbers, until gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        return functional.linear(x, unpack(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor | None]:
        (packed,), (gradient,) = ctx.saved_tensors, gradients
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ unpack(packed, gradient.dtype), None, of_bias


def round_blocks(weight: Tensor, bits: int) -> Tensor:
    """A weight [F,E], E a multiple of 32, as a packed matrix: Q8_0 in 8 bits, Q4_1 in 4.

    In 4 bits the range of each 32 numbers is the one of five with the smallest error.

    >>> round_blocks(torch.ones(2, 32), 8).shape
    torch.Size([2, 1, 34])

    Raises:
        ShapeError: other bits, or no such weight.
    """
    if bits not in (4, 8):
        raise ShapeError(f"bits is {bits!r}, expected 4 or 8")
    if weight.ndim != 2 or weight.shape[1] % 32 or not weight.numel():
        raise ShapeError(
            f"a weight has shape {list(weight.shape)}, expected two dims, the second a multiple "
            "of 32"
        )
    parts = weight.detach().split(max(1, 2**22 // weight.shape[1]))
    rounded = _eight if bits == 8 else _four
    return pack(torch.cat([rounded(part.float().unflatten(1, (-1, 32))) for part in parts]))


def _eight(groups: Tensor) -> Tensor:
    """Blocks [F, n, 34] of groups [F, n, 32]."""
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    levels = (groups / _divisor(scales)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), levels.view(torch.uint8)], dim=-1)


def _four(groups: Tensor) -> Tensor:
    """Blocks [F, n, 20] of groups [F, n, 32]."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for part in _NARROWER:
        cut = (high - low) * (1 - part) / 2
        start, scales = (low + cut).half(), ((high - low - 2 * cut) / 15).half()
        levels = ((groups - start.float()) / _divisor(scales)).round().clamp(0, 15)
        error = (levels * scales.float() + start.float() - groups).square().sum(-1, keepdim=True)
        new = (error, scales, start, levels)
        kept = best or new
        best = tuple(torch.where(error < kept[0], a, b) for a, b in zip(new, kept, strict=True))
    _, scales, start, levels = best
    whole = levels.to(torch.uint8)
    integers = whole[..., :16] | whole[..., 16:] << 4
    return torch.cat([scales.view(torch.uint8), start.view(torch.uint8), integers], dim=-1)


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales != 0, scales, 1).float()


def _check_indices(what: str, indices: Tensor | None, below: int) -> None:
    if indices is None:
        return
    if indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        raise ShapeError(
            f"{what} {str(indices.dtype)[6:]} {list(indices.shape)}, expected a vector of int64"
        )
    looked_at = indices.numel() and not torch.compiler.is_compiling()
    if looked_at and not 0 <= int(indices.min()) <= int(indices.max()) < below:
        raise IndexError(f"{what} out of range: expected 0 to {below - 1}")


def _check(matrix: Tensor) -> None:
    if not is_packed(matrix):
        known = ", ".join(f"{each.bytes} of {each.name}" for each in FORMATS.values())
        raise ShapeError(
            f"blocks are {str(matrix.dtype)[6:]} {list(matrix.shape)}, expected uint8 [rows, "
            f"blocks, bytes], bytes one of {known}"
        )
