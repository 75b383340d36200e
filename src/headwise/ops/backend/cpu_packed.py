"""What the backend `cpu` runs with packed matrices: they are made, and read as numbers."""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.backend.cpu_library import chosen_level, ready
from headwise.ops.backend.protocol import Offer
from headwise.ops.modes import are_plain, watched

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _packs(rows: Tensor, order: Tensor | None) -> bool:
    plain = not watched() and rows.is_cpu and rows.numel() > 0
    return plain and (order is None or (order.is_cpu and order.ndim == 1)) and not ready()


def pack(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows of a file, in an order, side by side."""
    indices = None if order is None else order.long().contiguous()
    packed: Tensor = torch.ops.headwise.pack.default(rows, indices)
    return packed


def _unpacks(packed: Tensor, dtype: torch.dtype, rows: Tensor | None) -> bool:
    indices = [] if rows is None else [rows]
    return (
        dtype in _DTYPES
        and packed.is_contiguous()
        and packed.numel() > 0
        and are_plain(packed, [])
        and all(each.is_cpu and each.ndim == 1 for each in indices)
        and not ready()
    )


def unpack(packed: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """The numbers of a packed matrix, or of some of its rows."""
    indices = None if rows is None else rows.long().contiguous()
    like = torch.empty(0, dtype=dtype)
    numbers: Tensor = torch.ops.headwise.unpack.default(packed, like, indices, chosen_level())
    return numbers


# What a `Backend` has of these.
OFFERS: dict[str, Any] = {"pack": Offer(pack, _packs), "unpack": Offer(unpack, _unpacks)}
