"""Attention of all ranks: each to its own keys, and one gather of what comes of it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headwise.hf.attend import attend_latents, attend_rows
from headwise.hf.cached_rows import SplitKV, rows_of
from headwise.hf.request import Request
from headwise.ops import Options, merge_attention


def attend_split(request: Request, *, observed: bool) -> Tensor | None:
    """out [B,S,H,V] of a request whose keys several ranks hold.

    None where it takes them all: weights that are asked for, rows that average what is hidden, a
    bias per key, somebody who looks on. They are then gathered into the request.
    """
    kv, options = request.kv, request.options
    assert isinstance(kv, SplitKV)
    whole = (request.empty, request.sinks, options.bias, options.chosen)
    unlike = any(each is not None for each in whole) or request.weights or request.dropout
    if unlike or observed:
        request.key, request.value = kv.dense(request.query.dtype)
        request.kv = None
        return None
    own = _own(request, kv)
    out, _, lse = attend_latents(own) or attend_rows(own)
    assert lse is not None
    outs, lses = gathered(kv.gather, out.transpose(1, 2), lse)
    return merge_attention(outs, lses, sinks=options.sinks)[0].transpose(1, 2).contiguous()


def _own(request: Request, kv: SplitKV) -> Request:
    """What the rank asks of its own keys; the sinks count once, and so not here."""
    query, options, positions = request.query, request.options, kv.positions
    plain = replace(options, sinks=None, return_lse=True)
    if not len(positions):  # a key that nothing sees, as modules do not expand none
        batch, heads, _, dim, value_dim = kv.shape
        key, value = (query.new_zeros(batch, heads, 1, size) for size in (dim, value_dim))
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        nothing = replace(plain, causal=False, window=None, mask=hidden)
        return replace(request, key=key, value=value, kv=None, options=nothing)
    if options.mask is not None:
        plain.mask = _columns(options.mask, positions)
    elif options.causal:
        _place(plain, positions, kv.length, query.shape[2])
    if isinstance(kv.own, tuple):
        return replace(request, key=kv.own[0], value=kv.own[1], kv=None, options=plain)
    key, value = rows_of(kv.own, query.dtype)
    return replace(request, key=key, value=value, kv=kv.own, options=plain)


def _place(options: Options, positions: Tensor, length: int, queries: int) -> None:
    """Say where the keys are, unless every one of the last queries sees all of them."""
    if options.window is None and int(positions[-1]) <= length - queries:
        options.causal = False
    else:
        options.key_positions = positions - (length - 1)


def _columns(mask: Tensor, positions: Tensor) -> Tensor:
    return mask if mask.shape[-1] == 1 else mask.index_select(-1, positions.to(mask.device))


def gathered(gather: Callable[[Tensor], Tensor], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """outs [N,B,H,S,V] and lses [N,B,H,S] of all ranks, sent as one tensor."""
    dim = out.shape[-1]
    every = gather(torch.cat([out, lse.unsqueeze(-1).contiguous().view(out.dtype)], dim=-1))
    return every[..., :dim], every[..., dim:].contiguous().view(lse.dtype).squeeze(-1)
