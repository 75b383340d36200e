"""The definition of linear attention: a matrix of each head, changed by one token after the other.

Gated delta rule: Yang et al. 2024, arXiv 2412.06464. Kimi delta attention: 2510.26692. Mamba-2: Dao
and Gu 2024, 2405.21060. Retention: Sun et al. 2023, 2307.08621.
"""

import torch
from torch import Tensor

from headwise.ops.linear_attention.call import LinearCall


def run(call: LinearCall) -> tuple[Tensor, Tensor]:
    """out [B,H,S,V] in the query's dtype, and the state after the last token."""
    exact = call.exact
    query, key = call.queries_and_keys()
    value, state = call.value.to(exact), call.first_state()
    decay, beta = call.decay_of(exact), None if call.beta is None else call.beta.to(exact)
    outs = []
    for t in range(query.shape[2]):
        q, k, v = query[:, :, t], key[:, :, t], value[:, :, t]
        after = state if decay is None else state * decay[:, :, t].exp().unsqueeze(-1)
        if beta is not None:
            v = beta[:, :, t, None] * (v - torch.einsum("bhdv,bhd->bhv", after, k))
        after = after + k.unsqueeze(-1) * v.unsqueeze(-2)
        out = call.scale * torch.einsum("bhdv,bhd->bhv", after, q)
        if call.lengths is not None:
            seen = (t < call.lengths).view(-1, 1, 1)
            out = out.masked_fill(~seen, 0.0)
            after = torch.where(seen.unsqueeze(-1), after, state)
        state = after
        outs.append(out)
    out = torch.stack(outs, dim=2) if outs else value
    return out.to(call.query.dtype), call.last_state(state)
