"""What the backend `cpu` runs with packed matrices: they are made, and read as numbers.

Nothing of PyTorch's does either, so that a call that is compiled or watched is served as well.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.backend.cpu_library import chosen_level, ready
from headwise.ops.backend.protocol import Offer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _packs(rows: Tensor, order: Tensor | None) -> bool:
    return rows.is_cpu and (order is None or (order.is_cpu and order.ndim == 1)) and not ready()


def pack(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows of a file, in an order, side by side."""
    indices = None if order is None else order.long().contiguous()
    packed: Tensor = torch.ops.headwise.pack.default(rows, indices)
    return packed


def _unpacks(packed: Tensor, dtype: torch.dtype, rows: Tensor | None) -> bool:
    fits = rows is None or (rows.is_cpu and rows.ndim == 1)
    served = dtype in _DTYPES and packed.is_cpu and packed.is_contiguous()
    return served and fits and not ready()


def unpack(packed: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """The numbers of a packed matrix, or of some of its rows."""
    indices = None if rows is None else rows.long().contiguous()
    like = torch.empty(0, dtype=dtype)
    numbers: Tensor = torch.ops.headwise.unpack.default(packed, like, indices, chosen_level())
    return numbers


# What a `Backend` has of these.
OFFERS: dict[str, Any] = {"pack": Offer(pack, _packs), "unpack": Offer(unpack, _unpacks)}
