"""Square roots of second moments: coordinates in which every direction counts alike."""

import torch
from torch import Tensor

# Directions with less than this share of the largest energy count as if they had it.
_FLOOR = 1e-6


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of moments [..., n, n] and its inverse, in float32.

    >>> half, inverse = root(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
    >>> half.diagonal().tolist(), (half @ inverse).diagonal().tolist()
    ([2.0, 3.0], [1.0, 1.0])
    """
    energy, vectors = torch.linalg.eigh(moment.double())
    largest = energy.amax(-1, keepdim=True)
    # where there is no energy at all, as it is
    floor = torch.where(largest > 1e-30, largest * _FLOOR, torch.ones_like(largest))
    scale = energy.clamp(min=floor).sqrt()[..., None, :]
    return ((vectors * scale) @ vectors.mT).float(), ((vectors / scale) @ vectors.mT).float()
