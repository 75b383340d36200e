"""What an error of a score, or of a value, does to a layer's output."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        """Where nothing is known: all alike."""
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
            weights = query[:, head] @ key[:, head // group].mT * scale
            squared = weights.masked_fill(hidden, -torch.inf).softmax(-1)
            values = value[:, head // group]
            projected = output[:, head * value.shape[-1] : (head + 1) * value.shape[-1]]
            seen = values @ projected.T
            out = squared @ seen
            squared = squared.square()
            apart = (
                seen.square().sum(-1)[:, None]
                + out.square().sum(-1)[:, :, None]
                - 2 * out @ seen.mT
            )
            scores.append((squared * apart.clamp(min=0)).sum(-1).mean() * scale**2)
            shares.append(squared.sum(-1).mean())
        return cls(torch.stack(scores), torch.stack(shares))
