"""Which weights of a model are one tensor of a GGUF file as it is, but for the order of its rows.

Such a weight can stay in the file's own blocks, none of which spans two rows. No family is listed:
Transformers' reader is given numbered rows, then numbered columns, in place of a tensor's values,
and what comes out says what it does to them. No weights are read.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.loading.gguf.file import GgufFile
from headwise.loading.gguf.stock_reader import StockReader, sources, stock_reader

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredRows:
    """A weight [F,E] or [N,F,E] that is one tensor of a GGUF file.

    Args:
        tensor: its name in the file.
        order: [F] int64, which row of the tensor each row of the weight is; None where all rows
            are in their place, as those of [N,F,E] always are.
    """

    tensor: str
    order: Tensor | None


def stored_rows(gguf: GgufFile, model: Any) -> dict[str, StoredRows]:
    """The weights that are one tensor of the file with its rows in some order, by their names.

    What is transposed, reshaped, scaled, shifted or joined of several tensors is not among them.

    Args:
        gguf: the header of a file.
        model: Transformers' model of the file's config, on the meta device.
    """
    reader, weights = stock_reader(gguf, model), model.state_dict()
    known: dict[tuple[str, Shape], Tensor | None] = {}
    stored = {}
    for weight, (tensor, *others) in sources(gguf, reader, model).items():
        shape = tuple(gguf.tensors[tensor].shape)
        if others or len(shape) not in (2, 3) or shape != tuple(weights[weight].shape):
            continue
        # A reader does the same in every block, and to try it on all experts takes minutes.
        kind = re.sub(r"^blk\.\d+", "blk", tensor), shape
        if kind not in known:
            known[kind] = _order(partial(_make, reader, weight, tensor), shape)
        order = known[kind]
        if order is not None:
            as_it_is = torch.equal(order, torch.arange(len(order)))
            if as_it_is or len(shape) == 2:
                stored[weight] = StoredRows(tensor, None if as_it_is else order)
    return stored


def _make(reader: StockReader, weight: str, tensor: str, values: Tensor) -> Tensor:
    return reader.make(weight, {tensor: values})


def _order(make: Callable[[Tensor], Tensor], shape: Shape) -> Tensor | None:
    """Which index of the first axis each becomes, int64; None if anything else is done."""
    for axis in range(1, len(shape)):
        numbered = _numbered(shape, axis)
        if not torch.equal(make(numbered), numbered):
            return None
    numbered = _numbered(shape, 0)
    made = make(numbered)
    if made.shape != numbered.shape:
        return None
    first, numbers = made.flatten(1)[:, :1], numbered.flatten(1)[:, 0]
    alike = torch.equal(made.flatten(1), first.expand(-1, math.prod(shape[1:])))
    permuted = torch.equal(first[:, 0].sort(descending=True).values, numbers)
    return (-first[:, 0] - 0.5).long() if alike and permuted else None


def _numbered(shape: Shape, axis: int) -> Tensor:
    """float32 of a shape: -0.5, -1.5 and so on along an axis, the same along the others.

    Negative and broken, so that absolute values, rounding and the like do not pass unnoticed.
    """
    length = shape[axis]
    assert length < 2**23, f"{length} halves are not all exact in float32"
    numbers = -(torch.arange(length, dtype=torch.float32) + 0.5)
    return numbers.view(-1, *(1 for _ in shape[axis + 1 :])).expand(shape)
