"""A request attended to: latents absorbed, keys and values by our operator, dropout by stock."""

import torch
from torch import Tensor

from headwise.hf.dropout import attend_with_dropout, eager_function
from headwise.hf.latent import absorb, expand, receives_latents
from headwise.hf.masks import runs_eagerly
from headwise.hf.request import Request
from headwise.ops import add_rest, run_call, weights_of

# out [B,S,H,V], and where asked for weights [B,H,S,L] and lse [B,H,S].
Attended = tuple[Tensor, Tensor | None, Tensor | None]


def attend_latents(request: Request) -> Attended | None:
    """MLA by absorption; None for other requests, and where expanding is right or cheaper.

    Latents that are not absorbed are expanded in the request.
    """
    module = request.module
    if not receives_latents(module):
        return None
    absorbed = absorb(request)
    if absorbed is None:
        request.key, request.value = expand(module, request.key, request.value)
        request.kv = None
        return None
    out, lse = absorbed
    if request.empty is not None:
        rows = expand(module, request.key, request.value)
        out = request.empty.fill(out, request.query, *rows)
    return out.transpose(1, 2).contiguous(), None, lse


def attend_rows(request: Request) -> Attended:
    """Attention over keys and values."""
    # what an eager function returns as weights is its own: with the sinks (gpt-oss), or without
    module = request.module
    own = request.weights and runs_eagerly(type(getattr(module, "config", None)))
    if request.dropout or (own and eager_function(module) is not None):
        return *attend_with_dropout(request), None
    # blocks that padding hides wholly leave a row nothing
    blocks = request.options.block_indices is not None and request.mask is not None
    request.options.return_lse |= request.sinks is not None or blocks
    out, lse = run_call(request.call())
    if request.rest is not None:
        out = add_rest(out, *request.rest)
    if blocks:
        assert lse is not None
        out = _averaged(request, out, lse)
    if request.empty is not None:
        out = request.empty.fill(out, request.query, *request.rows)
    weights = _weights(request) if request.weights else None
    if request.sinks is not None:
        assert lse is not None
        sinks = request.sinks.squeeze(-1).to(lse.dtype)
        kept = torch.sigmoid(lse - sinks).unsqueeze(-1)  # what the sink leaves of the weights
        out = (out * kept).to(out.dtype)
        weights = None if weights is None else (weights * kept).to(weights.dtype)
        lse = torch.logaddexp(lse, sinks)
    return out.transpose(1, 2).contiguous(), weights, lse


def _averaged(request: Request, out: Tensor, lse: Tensor) -> Tensor:
    """out [B,H,S,V], with the average of all values in rows that saw nothing.

    MiniMax-M3 adds the lowest number to every score of such a row, as its eager attention and its
    SDPA are given a float mask.
    """
    empty = torch.isneginf(lse)
    if not bool(empty.any()):
        return out
    value = request.rows[1].mean(dim=2, keepdim=True)
    average = value.repeat_interleave(out.shape[1] // value.shape[1], dim=1)
    return torch.where(empty.unsqueeze(-1), average.to(out.dtype), out)


def _weights(request: Request) -> Tensor:
    weights = weights_of(request.call()).to(request.query.dtype)
    if request.empty is None:
        return weights
    return request.empty.fill_weights(weights, request.query, request.rows[0])
