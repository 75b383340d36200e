"""What calibration says of a layer: moments of its inputs, what errors do, distances that are met.

All maths of the conversion is linear in the layer's input x, so that its second moment stands for
the calibration text: keys W x have the second moment W E[x x^T] W^T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.sensitivity import Sensitivity
from headwise.conversion.methods.whitening import shrunk


class Moments:
    """The second moment of a layer's inputs, [E+1, E+1], summed over batches."""

    def __init__(self, hidden_size: int) -> None:
        self.sum = torch.zeros(hidden_size + 1, hidden_size + 1)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs [..., E]."""
        rows = inputs.flatten(0, -2)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.sum += rows.T @ rows
        self.count += len(rows)

    @property
    def second(self) -> Tensor:
        """E[x x^T], [E+1, E+1]."""
        return self.sum / self.count

    @property
    def centred(self) -> Tensor:
        """Cov(x), [E+1, E+1]; zero in the last row and column."""
        second = self.second
        return second - torch.outer(second[-1], second[-1])

    @property
    def general_centred(self) -> Tensor:
        """Cov(x) as it may be expected of other texts, [E+1, E+1]."""
        return shrunk(self.centred)

    @property
    def general(self) -> Tensor:
        """E[x x^T] as it may be expected of other texts, [E+1, E+1]."""
        return self.second - self.centred + self.general_centred


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one layer.

    Args:
        moments: of the inputs of the layer as it will be, after the layers before it.
        sensitivity: what errors of scores and values do.
        frequencies: [D/2], of the rotary planes, in radians per token.
        distances: [L], how often each distance between query and key is met, summing to 1.
        rotary_scale: what cos and sin are multiplied with (YaRN); 1 for most models.
    """

    moments: Moments
    sensitivity: Sensitivity
    frequencies: Tensor
    distances: Tensor
    rotary_scale: float = 1.0

    @classmethod
    def even(cls, layer: Projections) -> "LayerStatistics":
        """For where nothing is known: all count alike, and a query meets its own token alone."""
        moments = Moments(layer.key.shape[1] - 1)
        # a bias is no direction
        moments.sum, moments.count = torch.eye(layer.key.shape[1]), 1
        moments.sum[-1, -1] = 0
        frequencies = torch.zeros(layer.head_dim // 2)
        return cls(moments, Sensitivity.even(layer.heads), frequencies, torch.ones(1))

    @property
    def mean_turn(self) -> Tensor:
        """The mean rotation of each plane over the distances, complex [D/2]."""
        turn = torch.arange(len(self.distances))[:, None] * self.frequencies
        return torch.polar(self.distances[:, None].expand_as(turn), -turn).sum(0)
