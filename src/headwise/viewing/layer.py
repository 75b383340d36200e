"""What was seen of one layer: the chosen rows in full, all rows pooled, figures of each head."""

from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS = ("entropy", "distance", "first", "previous", "itself")


@dataclass(eq=False, kw_only=True)
class LayerView:
    """One layer's attention, float32 on the CPU; h heads were chosen, r rows, of n tokens.

    heads: their indices [h]. raw [h,r,n]: q.k, NaN where nothing is scored. added [h,r,n]: what the
    model adds after scale and cap (a bias), None where nothing is. content [h,r,n]: for MLA, the
    part of raw that comes from the content; the rest is the rope part's. lse [h,r]. tiles_max and
    tiles_mean [h,T,T]: all rows, pooled in squares of `tile` tokens; None where no overview was
    asked for. statistics [h,5]: means over rows (entropy in bits, distance in tokens, and the
    shares of weight on the first token, the previous one and the token itself).
    """

    index: int
    all_heads: int
    kv_heads: int
    head_dim: int
    latent: tuple[int, int] | None
    causal: bool
    scale: float
    softcap: float | None
    window: int | None
    heads: list[int]
    rows: list[int]
    raw: Tensor
    added: Tensor | None = None
    content: Tensor | None
    lse: Tensor
    tile: int
    tiles_max: Tensor | None = None
    tiles_mean: Tensor | None = None
    statistics: Tensor

    @property
    def mechanism(self) -> str:
        """MLA, MHA, MQA or GQA."""
        if self.latent is not None:
            return "MLA"
        if self.kv_heads == self.all_heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def kv_head_of(self) -> list[int]:
        """The kv head that each of `heads` reads; for MLA the one latent, 0."""
        return [head // (self.all_heads // self.kv_heads) for head in self.heads]

    @property
    def not_numbers(self) -> list[int]:
        """Those of `heads` that have weights which are NaN, in a row that was seen or pooled."""
        broken = self.lse.isnan().any(dim=1) | self.statistics.isnan().any(dim=1)
        return [head for head, is_broken in zip(self.heads, broken.tolist()) if is_broken]

    @property
    def scores(self) -> Tensor:
        """What enters the softmax, [h,r,n]: scaled, capped, with what is added; -inf if hidden."""
        score = self.raw * self.scale
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        if self.added is not None:
            score = score + self.added
        return score.nan_to_num(nan=float("-inf"), neginf=float("-inf"))

    @property
    def weights(self) -> Tensor:
        """The softmax weights [h,r,n]; a row sums to 1, to less where a sink takes a part."""
        shift = self.lse.masked_fill(self.lse.isneginf(), 0.0)
        return torch.exp(self.scores - shift[..., None])
