"""The definition of attention, to be read beside the papers. Every other backend must equal it.

Scaled dot-product attention: Vaswani et al. 2017, arXiv 1706.03762, eq. 1. Grouped heads: Ainslie
et al. 2023, arXiv 2305.13245. ALiBi: Press et al. 2021, arXiv 2108.12409. Sinks: gpt-oss, 2025.
"""

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall
from headwise.ops.attend.chosen import chosen_mask


def scores(call: AttentionCall) -> Tensor:
    """Scores before the softmax, -inf where a query may not look: [B,H,S,L], fp32 or fp64."""
    options = call.options
    exact = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key = call.query.to(exact), call.key.to(exact)
    if call.query_tail is not None and call.key_tail is not None:
        query = torch.cat([query, call.query_tail.to(exact)], dim=-1)
        key = torch.cat([key, call.key_tail.to(exact)], dim=-1)
    heads, kv_heads, context = query.shape[1], key.shape[1], key.shape[2]
    if options.kv_lengths is not None:
        # bytes past a length may be anything, NaN included
        key = key.masked_fill(~_within_length(call), 0.0)
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    score = options.scale * query @ key.transpose(-1, -2)
    if options.softcap is not None:
        score = options.softcap * torch.tanh(score / options.softcap)
    if options.bias is not None:
        score = score + options.bias.to(exact)
    position, key_position = positions(call)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(exact).view(1, heads, 1, 1)
        score = score + slopes * (key_position - position)
    visible = torch.ones(1, 1, 1, context, dtype=torch.bool, device=query.device)
    if options.causal:
        visible = visible & (key_position <= position)
    if options.window is not None:
        visible = visible & (key_position > position - options.window)
    if options.mask is not None:
        visible = visible & options.mask
    chosen = chosen_mask(options, heads, context)
    if chosen is not None:
        visible = visible & chosen
    if options.kv_lengths is not None:
        visible = visible & _within_length(call).transpose(-1, -2)
    # a bias of -inf hides a key too: filled here as well, it cannot make a gradient NaN
    return score.masked_fill(~visible | torch.isneginf(score), float("-inf"))


def positions(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Positions of queries [B|1,1,S,1] and keys [1,1,1,L]: the last query sits on the last key.

    Where the keys' are given, it is at 0.
    """
    length, context = call.query.shape[2], call.key.shape[2]
    device, lengths = call.query.device, call.options.kv_lengths
    if call.options.key_positions is not None:
        query_position = torch.arange(1 - length, 1, device=device).view(1, 1, -1, 1)
        return query_position, call.options.key_positions.to(device).view(1, 1, 1, -1)
    last = torch.tensor([context]) if lengths is None else lengths
    start = last.to(device).view(-1, 1, 1, 1) - length
    query_position = start + torch.arange(length, device=device).view(1, 1, -1, 1)
    return query_position, torch.arange(context, device=device).view(1, 1, 1, -1)


def weights(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Softmax weights [B,H,S,L], lse [B,H,S]; a row that sees nothing has weights 0, lse -inf."""
    score, sinks = scores(call), call.options.sinks
    if sinks is None:
        sink = score.new_full((*score.shape[:3], 1), float("-inf"))
    else:
        sink = sinks.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
    score = torch.cat([sink, score], dim=-1)
    # by the row's maximum and sum: exp(score - lse) does not sum to 1 where the lse, which is
    # rounded, is large. The shift cancels out, so it needs no gradient.
    peak = score.detach().amax(dim=-1, keepdim=True)
    weight = torch.exp(score - peak.masked_fill(torch.isneginf(peak), 0.0))
    total = weight.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + torch.log(total)).squeeze(-1)
    return weight[..., 1:] / total, lse


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out [B,H,S,V] in the query's dtype and, when asked, lse [B,H,S]."""
    weight, lse = weights(call)
    value = call.value.to(weight.dtype)
    if call.options.kv_lengths is not None:
        value = value.masked_fill(~_within_length(call), 0.0)
    group_size = call.query.shape[1] // value.shape[1]
    out = weight @ value.repeat_interleave(group_size, dim=1)
    return out.to(call.query.dtype), lse if call.options.return_lse else None


def _within_length(call: AttentionCall) -> Tensor:
    """True at the keys before each sequence's length: [B,1,L,1]."""
    assert call.options.kv_lengths is not None
    index = torch.arange(call.key.shape[2], device=call.query.device)
    return (index < call.options.kv_lengths[:, None])[:, None, :, None]
