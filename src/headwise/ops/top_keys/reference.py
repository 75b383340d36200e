"""The definition of exact search, on any device and in any dtype."""

import torch
from torch import Tensor

# Scores that exist at once.
_MOST = 2**24


def top_keys(query: Tensor, key: Tensor, top: int, *, mask: Tensor | None) -> Tensor:
    """int32 [B,H,S,top], ascending, then -1; as `headwise.ops.top_keys`."""
    batch, heads, length, dim = query.shape
    kv_heads, context = key.shape[1:3]
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    each = max(1, _MOST // max(1, batch * kv_heads * context))
    chosen = []
    for part in rows.split(each, dim=2):
        score = part.to(exact) @ key.to(exact).transpose(-1, -2)
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], float("-inf"))
        score, order = score.sort(dim=-1, descending=True, stable=True)
        none = score[..., :top].isneginf()
        order = order[..., :top].masked_fill(none, context).sort(dim=-1).values
        chosen.append(order.masked_fill(order == context, -1).int())
    return torch.cat(chosen, dim=2).view(batch, heads, length, top)
