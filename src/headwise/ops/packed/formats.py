"""The block formats of GGUF in which weights are multiplied as they are stored.

A packed matrix is uint8 [F, blocks, bytes of a block]: whole rows of blocks, 16 rows side by side
(csrc/packed_formats.h says how). The bytes of a block tell the formats apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that lie side by side.
GROUP = 16


@dataclass(frozen=True)
class BlockFormat:
    """One format: `columns` of a row in `bytes`, of which some at an end are float16.

    Args:
        name: as the gguf package has it.
        columns: that share a block.
        bytes: of a block.
        first: bytes at its beginning that are float16; the rest are units of four bytes.
        last: the same at its end.
    """

    name: str
    columns: int
    bytes: int
    first: int
    last: int = 0

    def units(self) -> list[tuple[int, int]]:
        """Where each unit of a block is, and its bytes."""
        sizes = [2] * (self.first // 2)
        sizes += [4] * ((self.bytes - self.first - self.last) // 4) + [2] * (self.last // 2)
        return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


_FORMATS = (
    BlockFormat("Q4_0", 32, 18, 2),
    BlockFormat("Q4_1", 32, 20, 4),
    BlockFormat("Q5_0", 32, 22, 2),
    BlockFormat("Q5_1", 32, 24, 4),
    BlockFormat("Q8_0", 32, 34, 2),
    BlockFormat("Q4_K", 256, 144, 4),
    BlockFormat("Q5_K", 256, 176, 4),
    BlockFormat("Q6_K", 256, 210, 0, 2),
)
FORMATS = {each.name: each for each in _FORMATS}
_BY_BYTES = {each.bytes: each for each in _FORMATS}


def is_packed(weight: Tensor) -> bool:
    """Whether a tensor is a packed matrix, by its dtype and its shape."""
    return weight.dtype == torch.uint8 and weight.ndim == 3 and weight.shape[2] in _BY_BYTES


def format_of(packed: Tensor) -> BlockFormat:
    """The format of a packed matrix.

    >>> format_of(torch.zeros(16, 2, 144, dtype=torch.uint8)).name
    'Q4_K'
    """
    return _BY_BYTES[packed.shape[2]]


def packed_columns(packed: Tensor) -> int:
    """The columns of a packed matrix.

    >>> packed_columns(torch.zeros(16, 2, 144, dtype=torch.uint8))
    512
    """
    return packed.shape[1] * format_of(packed).columns


def weight_sizes(weight: Tensor) -> tuple[int, ...]:
    """[F,E] of a weight, packed or not; the shape of what is no matrix.

    >>> weight_sizes(torch.zeros(16, 2, 144, dtype=torch.uint8))
    (16, 512)
    >>> weight_sizes(torch.zeros(3, 5))
    torch.Size([3, 5])
    """
    return (weight.shape[0], packed_columns(weight)) if is_packed(weight) else weight.shape
