"""What calibration says of a layer: moments of its inputs, what errors do, distances that are met.

All maths of the conversion is linear in the layer's input x, so that its second moment stands for
the calibration text: keys W x have the second moment W E[x x^T] W^T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.conversion.methods.planes import plane_energy, to_planes
from headwise.conversion.methods.projections import Projections

# Directions with less than this share of the largest energy count as if they had it.
_FLOOR = 1e-6
# Of a correlation, how much is taken to hold in other texts: chosen on SmolLM2 at half its cache.
_TRUSTED = 1 / 3


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
class Sensitivity:
    """Squared errors of the output, each for one query head.

    To first order a score's error d changes the output by a (v - out) d, where a is the weight of
    that token, v its value and out the head's output; independent errors add up in squares.

    Args:
        score: [H], for each unit of squared error of all q.k, not yet scaled.
        value: [H], the factor for the squared error of all values: the sum of squared weights.
    """

    score: Tensor
    value: Tensor

    @classmethod
    def even(cls, heads: int) -> "Sensitivity":
        """For where nothing is known: all count alike."""
        return cls(torch.ones(heads), torch.ones(heads))

    @classmethod
    def measure(
        cls, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float
    ) -> "Sensitivity":
        """From rotated query [B,H,L,D], key [B,K,L,D], value [B,K,L,V] and W_o [E, H*V]."""
        heads, length = query.shape[1], query.shape[2]
        group = heads // key.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores, shares = [], []
        for head in range(heads):
            logits = query[:, head] @ key[:, head // group].mT * scale
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            values = value[:, head // group]
            projection = output[:, head * value.shape[-1] : (head + 1) * value.shape[-1]]
            projected = values @ projection.T
            out = weights @ projected
            squared = weights.square()
            distance = (
                projected.square().sum(-1)[:, None]
                + out.square().sum(-1)[:, :, None]
                - 2 * out @ projected.mT
            )
            scores.append((squared * distance.clamp(min=0)).sum(-1).mean() * scale**2)
            shares.append(squared.sum(-1).mean())
        return cls(torch.stack(scores), torch.stack(shares))

    def key_weight(self, layer: Projections, second: Tensor) -> Tensor:
        """[K, D/2]: the root of the energy of the queries that meet each plane of each kv head."""
        energy = plane_energy(to_planes(layer.query, layer.heads), second) * self.score[:, None]
        energy = energy.view(layer.kv_heads, layer.group_size, -1).sum(1)
        return energy.clamp(min=max(float(energy.max()) * 1e-9, 1e-30)).sqrt()

    def key_moments(self, layer: Projections, second: Tensor) -> Tensor:
        """[K, D, D]: what the queries make of the keys of each kv head, as their metric."""
        query = layer.query.view(layer.heads, layer.head_dim, -1)
        moment = torch.einsum("hdx,xy,hcy->hdc", query, second, query) * self.score[:, None, None]
        return moment.view(layer.kv_heads, layer.group_size, *moment.shape[1:]).sum(1)

    def value_moments(self, layer: Projections) -> Tensor:
        """[K, V, V]: what the output projection makes of each head's values, as their metric."""
        groups = (layer.kv_heads, layer.group_size)
        output = layer.output.view(-1, *groups, layer.value_dim)
        weighted = output * self.value.view(*groups, 1)
        return torch.einsum("ekgv,ekgw->kvw", weighted, output)


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
