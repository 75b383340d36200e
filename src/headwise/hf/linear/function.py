"""A function of Transformers' modeling files, and ours in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What says that several sequences lie in one row.
_PACKED = ("cu_seqlens", "seq_idx", "cu_seq_lens_q")


@dataclass(frozen=True)
class Function:
    """A function by its name.

    ours: makes what stands in for it of what the file has under the name. tried: what a function
    gives for inputs of a trial, with what it changes in place.
    """

    name: str
    ours: Callable[[Callable[..., Any]], Callable[..., Any]]
    tried: Callable[[Callable[..., Any]], tuple[Tensor, ...]]


def is_packed(others: dict[str, Any]) -> bool:
    """Whether sequences are packed, by what else a function is given."""
    return any(others.get(name) is not None for name in _PACKED)


class Random:
    """Numbers for a trial, the same for both sides of it."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device="cpu")
