"""Linear attention in chunks of tokens, by matrix products: the form for many of them.

Within a chunk, with G the decays summed up from its first token and S the state before it, what the
tokens add is the solution of a triangular system (the WY form, for the delta rule):

    (I + strictly lower(beta_t exp(G_t - G_i) k_t . k_i)) u = beta (v - exp(G) k S)
    o_t = exp(G_t) q_t S + sum over i <= t of exp(G_t - G_i) (q_t . k_i) u_i
    S' = exp(G_C) S + sum over i of exp(G_C - G_i) k_i u_i^T

No exponent is positive. Decays of each dim are taken from the first token of a block of `_BLOCK`,
which lies between two tokens of different blocks; within a block each pair has its own.

Yang et al. 2024, arXiv 2406.06484 (the delta rule in chunks), 2412.06464 (gates).
"""

import torch
from torch import Tensor

from headwise.ops.linear_attention.call import LinearCall

_CHUNK, _BLOCK = 64, 16


def run(call: LinearCall) -> tuple[Tensor, Tensor]:
    """out [B,H,S,V] in the query's dtype, and the state [B,H,D,V] after the last token."""
    exact, length = call.exact, call.query.shape[2]
    query, key = (call.per_head(rows.to(exact)) for rows in (call.query, call.key))
    value, state = call.value.to(exact), call.first_state()
    decay, beta = call.decay_of(exact), None if call.beta is None else call.beta.to(exact)
    if call.lengths is not None:
        # a token past a length adds nothing and lets nothing decay
        position = torch.arange(length, device=value.device)
        past = (position >= call.lengths[:, None])[:, None, :, None]
        key, value = key.masked_fill(past, 0.0), value.masked_fill(past, 0.0)
        decay = None if decay is None else decay.masked_fill(past, 0.0)
        beta = None if beta is None else beta.masked_fill(past.squeeze(-1), 0.0)
    outs = []
    for first in range(0, length, _CHUNK):
        part = slice(first, min(first + _CHUNK, length))
        out, state = _chunk(
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
            None if decay is None else decay[:, :, part],
            None if beta is None else beta[:, :, part],
            state,
        )
        outs.append(call.scale * out)
    out = torch.cat(outs, dim=2) if outs else value
    if call.lengths is not None:
        out = out.masked_fill(past, 0.0)
    return out.to(call.query.dtype), state


def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """out [B,H,C,V] and the next state, of tokens [B,H,C,...]."""
    count = query.shape[2]
    summed = None if decay is None else decay.cumsum(dim=2)
    from_state = key if summed is None else key * summed.exp()
    if beta is None:
        added = value
    else:
        lower = _products(key, key, summed).tril(-1) * beta.unsqueeze(-1)
        right = beta.unsqueeze(-1) * (value - from_state @ state)
        eye = torch.eye(count, dtype=lower.dtype, device=lower.device)
        added = torch.linalg.solve_triangular(eye + lower, right, upper=False, unitriangular=True)
    asked = query if summed is None else query * summed.exp()
    out = asked @ state + _products(query, key, summed).tril() @ added
    if summed is None:
        return out, state + key.transpose(-1, -2) @ added
    last = summed[:, :, -1:]
    left = key * (last - summed).exp()
    return out, state * last.exp().transpose(-1, -2) + left.transpose(-1, -2) @ added


def _products(query: Tensor, key: Tensor, summed: Tensor | None) -> Tensor:
    """exp(G_t - G_i) q_t . k_i, [B,H,C,C]; above the diagonal anything finite."""
    if summed is None:
        return query @ key.transpose(-1, -2)
    if summed.shape[-1] == 1:
        between = (summed - summed.transpose(-1, -2)).clamp(max=0.0)
        return query @ key.transpose(-1, -2) * between.exp()
    count = query.shape[2]
    columns = []
    for first in range(0, count, _BLOCK):
        # the keys of one block, for the queries of the block and of those after it
        block = slice(first, min(first + _BLOCK, count))
        k, g = key[:, :, block], summed[:, :, block]
        inside = (summed[:, :, block].unsqueeze(3) - g.unsqueeze(2)).clamp(max=0.0).exp()
        own = torch.einsum("bhcd,bhed,bhced->bhce", query[:, :, block], k, inside)
        parts = [own.new_zeros(*own.shape[:2], first, own.shape[3]), own]
        if block.stop < count:
            edge = g[:, :, -1:]
            later = query[:, :, block.stop :] * (summed[:, :, block.stop :] - edge).exp()
            parts.append(later @ (k * (edge - g).exp()).transpose(-1, -2))
        columns.append(torch.cat(parts, dim=2))
    return torch.cat(columns, dim=3)
