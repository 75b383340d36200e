"""What an error of a score, or of a value, does to a layer's output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.conversion.methods.planes import plane_energy, to_planes
from headwise.conversion.methods.projections import Projections


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
