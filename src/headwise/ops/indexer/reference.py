"""The definition of an indexer's choice, on any device and in any dtype."""

import torch
from torch import Tensor

# Products of heads and keys that exist at once.
_MOST = 2**24


def index_topk(
    query: Tensor, key: Tensor, weights: Tensor, top: int, *, causal: bool, mask: Tensor | None
) -> Tensor:
    """int32 [B,S,top], ascending, then -1; as `headwise.ops.index_topk`."""
    length, heads, context = query.shape[1], query.shape[2], key.shape[1]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    every = torch.arange(context, device=key.device)
    each = max(1, _MOST // max(1, query.shape[0] * heads * context))
    chosen = []
    for first in range(0, length, each):
        rows = slice(first, min(first + each, length))
        # [B,s,I,L]
        products = query[:, rows].to(exact) @ key.to(exact).transpose(1, 2).unsqueeze(1)
        score = (weights[:, rows].to(exact).unsqueeze(-1) * products.relu()).sum(dim=2)
        if causal:
            position = torch.arange(rows.start, rows.stop, device=key.device) + context - length
            score = score.masked_fill(every > position[:, None], float("-inf"))
        if mask is not None:
            seen = mask[:, rows] if mask.shape[1] > 1 else mask
            score = score.masked_fill(~seen, float("-inf"))
        score, order = score.sort(dim=-1, descending=True, stable=True)
        none = score[..., :top].isneginf()
        order = order[..., :top].masked_fill(none, context).sort(dim=-1).values
        chosen.append(order.masked_fill(order == context, -1).int())
    if not chosen:
        return query.new_empty(query.shape[0], 0, top, dtype=torch.int32)
    return torch.cat(chosen, dim=1)
