"""Linear attention in chunks of tokens, by matrix products: the form for many of them.

Within a chunk, with G the decays summed up from its first token and S the state before it, what the
tokens add is the solution of a triangular system (the WY form, for the delta rule):

    (I + strictly lower(beta_t exp(G_t - G_i) k_t . k_i)) u = beta (v - exp(G) k S)
    o_t = exp(G_t) q_t S + sum over i <= t of exp(G_t - G_i) (q_t . k_i) u_i
    S' = exp(G_C) S + sum over i of exp(G_C - G_i) k_i u_i^T

No exponent is positive: decays of each dim are taken from a token that lies between the two, half
by half, down to blocks of `_BLOCK` tokens, in which every pair has its own.

Yang et al. 2024, arXiv 2406.06484 (the delta rule in chunks), 2412.06464 (gates).
"""

import torch
from torch import Tensor
from torch.nn import functional

from headwise.ops.linear_attention.call import LinearCall

# Tokens of a chunk and of a block, powers of two.
_CHUNK, _BLOCK = 64, 4
# A decay that leaves nothing in any dtype: sums of those are still exact in float64.
_NOTHING = -1e4


def run(call: LinearCall) -> tuple[Tensor, Tensor]:
    """out and state, as `reference.run`, in full precision whatever autocast says."""
    device = call.query.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return _run(call)
    with torch.autocast(device, enabled=False):
        return _run(call)


def _run(call: LinearCall) -> tuple[Tensor, Tensor]:
    """out [B,H,S,V] in the query's dtype, and the state after the last token."""
    exact, length = call.exact, call.query.shape[2]
    query, key = call.queries_and_keys()
    value, state = call.value.to(exact), call.first_state()
    # decays are summed up in float64: a strong one must not round those behind it
    decay = call.decay_of(torch.float64)
    decay = None if decay is None else decay.clamp(min=_NOTHING)
    beta = None if call.beta is None else call.beta.to(exact).unsqueeze(-1)
    past = None
    if call.lengths is not None:
        # a token past a length adds nothing and lets nothing decay
        position = torch.arange(length, device=value.device)
        past = (position >= call.lengths[:, None])[:, None, :, None]
        key, value = key.masked_fill(past, 0.0), value.masked_fill(past, 0.0)
        decay = None if decay is None else decay.masked_fill(past, 0.0)
        beta = None if beta is None else beta.masked_fill(past, 0.0)
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
    out = out if past is None else out.masked_fill(past, 0.0)
    return out.to(call.query.dtype), call.last_state(state)


def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """out [B,H,C,V] and the next state, of tokens [B,H,C,...]."""
    summed, exact = None if decay is None else decay.cumsum(dim=2), value.dtype
    grown = None if summed is None else summed.to(exact).exp()
    if beta is None:
        (scores,), added = _products((query,), key, summed), value
    else:
        scores, lower = _products((query, key), key, summed)
        right = beta * (value - (key if grown is None else key * grown) @ state)
        added = torch.linalg.solve_triangular(
            (beta * lower).tril(-1), right, upper=False, unitriangular=True
        )
    out = (query if grown is None else query * grown) @ state + scores.tril() @ added
    if summed is None:
        return out, state + key.transpose(-1, -2) @ added
    last = summed[:, :, -1:]
    left = key * (last - summed).to(exact).exp()
    return out, state * last.to(exact).exp().transpose(-1, -2) + left.transpose(-1, -2) @ added


def _products(queries: tuple[Tensor, ...], key: Tensor, summed: Tensor | None) -> list[Tensor]:
    """exp(G_t - G_i) q_t . k_i of each of the queries, [B,H,C,C]; finite above the diagonal."""
    exact = key.dtype
    if summed is None:
        return [query @ key.transpose(-1, -2) for query in queries]
    if summed.shape[-1] == 1:
        between = (summed - summed.transpose(-1, -2)).tril().to(exact).exp()
        return [query @ key.transpose(-1, -2) * between for query in queries]
    count = size = key.shape[2]
    while size & (size - 1) or size < _BLOCK:
        size += 1
    if size > count:
        missing = (0, 0, 0, size - count)
        key = functional.pad(key, missing)
        summed = torch.cat([summed, *[summed[:, :, -1:]] * (size - count)], dim=2)
        queries = tuple(functional.pad(query, missing) for query in queries)
    found = [query.new_zeros(*query.shape[:2], size, size) for query in queries]
    # every pair in a block by itself
    k, g = key.unflatten(2, (-1, _BLOCK)), summed.unflatten(2, (-1, _BLOCK))
    later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=key.device).triu(1)
    between = (g.unsqueeze(4) - g.unsqueeze(3)).masked_fill(later.unsqueeze(-1), 0.0)
    between = between.to(exact).exp() * k.unsqueeze(3)
    for query, whole in zip(queries, found, strict=True):
        own = (between @ query.unflatten(2, (-1, _BLOCK)).unsqueeze(-1)).squeeze(-1)
        _diagonal(whole, _BLOCK).copy_(own)
    # and the halves of larger ones, by the last token of the first half
    half = _BLOCK
    while half < size:
        k, g = key.unflatten(2, (-1, 2 * half)), summed.unflatten(2, (-1, 2 * half))
        edge = g[:, :, :, half - 1 : half]
        early = k[:, :, :, :half] * (edge - g[:, :, :, :half]).to(exact).exp()
        early, late = early.transpose(-1, -2), (g[:, :, :, half:] - edge).to(exact).exp()
        for query, whole in zip(queries, found, strict=True):
            own = (query.unflatten(2, (-1, 2 * half))[:, :, :, half:] * late) @ early
            _diagonal(whole, 2 * half)[..., half:, :half].copy_(own)
        half *= 2
    return [whole[:, :, :count, :count] for whole in found]


def _diagonal(whole: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of matrices [B,H,C,C], as a view [B,H,C / size,size,size]."""
    blocks = whole.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2)
