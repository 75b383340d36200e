"""What the trials of indexers share: a copy of a module with random numbers, and its inputs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Random = Callable[..., Tensor]


def twin_of(module: Any, **changes: Any) -> tuple[Any, Random]:
    """A copy in float64 with random weights and other attributes, and the source of its numbers."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    twin = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin.to_empty(device="cpu")
        for buffer in twin.buffers():
            buffer.fill_(1)
    twin.double()
    for parameter in twin.parameters():
        parameter.data = random(*parameter.shape)
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin, random


def rotation(random: Random, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, tokens, dim] of random angles, each of them twice."""
    angles = random(1, tokens, dim // 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def causal(tokens: int) -> Tensor:
    """Boolean [1, tokens, tokens]."""
    return torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
