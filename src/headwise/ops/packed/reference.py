"""Packed matrices by PyTorch and the gguf package: the definition, for where no kernel runs."""

import torch
from torch import Tensor

from headwise.ops.packed.formats import GROUP, BlockFormat, format_of


def pack(rows: Tensor, order: Tensor | None = None) -> Tensor:
    """Rows [F, blocks, bytes] as a file has them, or those in `order` [n], as a packed matrix."""
    chosen, format = rows if order is None else rows[order], format_of(rows)
    groups = [_turned(group, format, back=False) for group in chosen.split(GROUP)]
    return torch.cat(groups) if groups else chosen


def unpack(packed: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The numbers of a packed matrix [F,E], or of some of its rows [n]: [n,E] in `dtype`."""
    from gguf import GGMLQuantizationType, dequantize

    format = format_of(packed)
    blocks = torch.cat([_turned(group, format, back=True) for group in packed.split(GROUP)])
    if rows is not None:
        blocks = blocks[rows]
    numbers = dequantize(blocks.cpu().flatten(1).numpy(), GGMLQuantizationType[format.name])
    return torch.from_numpy(numbers).to(packed.device, dtype)


def _turned(group: Tensor, format: BlockFormat, *, back: bool) -> Tensor:
    """A group [n, blocks, bytes] with each unit of all rows side by side, or back."""
    count, blocks, _ = group.shape
    by_block = group.reshape(blocks, -1) if back else group.transpose(0, 1)
    parts = []
    for offset, size in format.units():
        if back:
            unit = by_block[:, offset * count : (offset + size) * count]
            parts.append(unit.reshape(blocks, count, size))
        else:
            parts.append(by_block[:, :, offset : offset + size].reshape(blocks, -1))
    turned = torch.cat(parts, dim=-1)
    return turned.transpose(0, 1) if back else turned.reshape(count, blocks, -1)
