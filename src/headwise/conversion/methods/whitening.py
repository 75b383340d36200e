"""Moments as metrics: their square roots, and what of them holds for other texts too."""

import torch
from torch import Tensor

# Directions with less than this share of the largest energy count as if they had it.
_FLOOR = 1e-6
# Of a correlation, how much is taken to hold in other texts: chosen on SmolLM2 at half its cache.
_TRUSTED = 1 / 3


def shrunk(covariance: Tensor) -> Tensor:
    """A covariance drawn to its diagonal.

    What is to be kept by it is then not only what the calibration text shows: directions that it
    hardly takes may matter in the next one.

    >>> shrunk(torch.tensor([[2.0, 0.75], [0.75, 1.0]]))
    tensor([[2.0000, 0.2500],
            [0.2500, 1.0000]])
    """
    return _TRUSTED * covariance + (1 - _TRUSTED) * covariance.diagonal().diag()


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
