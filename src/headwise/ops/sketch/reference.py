"""The definition of a choice by weights, on any device."""

import torch
from torch import Tensor

from headwise.ops.attend.visible import visible_keys
from headwise.ops.sketch.call import ChoiceCall

# Weights of queries and keys that exist at once.
_MOST = 2**24


def choose_keys(call: ChoiceCall) -> tuple[Tensor, Tensor]:
    """int32 [B,K,S,most], ascending, then -1, and the rest [B,H,S]: `headwise.ops.choose_keys`."""
    query, budget = call.query, call.budget
    batch, heads, length, _ = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = call.sketch.dense(exact)[0]  # [B,K,L,D]
    kv_heads, context = key.shape[1:3]
    each = max(1, _MOST // max(1, batch * heads * context))
    every = torch.arange(context, device=query.device)
    lengths = call.sketch.lengths
    ends = torch.tensor([context]) if lengths is None else lengths
    ends = ends.to(query.device).view(-1, 1, 1, 1)
    chosen, rests = [], []
    for first in range(0, length, each):
        rows = slice(first, min(first + each, length))
        own = query[:, :, rows].to(exact).unflatten(1, (kv_heads, -1))  # [B,K,G,s,D]
        score = (own @ key.unsqueeze(2).transpose(-1, -2)) * call.scale
        if call.softcap:
            score = call.softcap * torch.tanh(score / call.softcap)
        seen = (every < ends).expand(batch, 1, rows.stop - first, context)
        if call.causal:
            position = ends - length + torch.arange(first, rows.stop, device=key.device)[:, None]
            causal = visible_keys(position, every, causal=True, window=None)
            assert causal is not None
            seen = seen & causal
        if call.mask is not None:
            seen = seen & (call.mask[:, :, rows] if call.mask.shape[2] > 1 else call.mask)
        score = score.masked_fill(~seen.unsqueeze(2), float("-inf"))
        unknown = score.isnan()  # enters no sum, and is chosen, so that it is seen
        score = score.masked_fill(unknown, float("-inf"))
        if call.sinks is not None:
            sink = call.sinks.to(exact).view(1, kv_heads, -1, 1, 1)
            score = torch.cat([score, sink.expand(*score.shape[:4], 1)], dim=-1)
        each_head = score.softmax(dim=-1)[..., :context].nan_to_num(0)  # [B,K,G,s,L]
        weights = each_head.sum(dim=2)
        certain = _in_any_case(seen, budget.first, budget.recent) | unknown.any(dim=2)
        rank = weights.masked_fill(certain, float("inf"))
        order = rank.masked_fill(~seen, -1.0).sort(dim=-1, descending=True, stable=True).indices
        order = order[..., : budget.most]
        taken = seen.expand_as(weights).gather(-1, order)
        if budget.mass is not None:
            sums = weights.gather(-1, order).cumsum(dim=-1)
            sums = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], dim=-1)
            more = sums < budget.mass * weights.sum(dim=-1, keepdim=True)
            kept = torch.isinf(rank.gather(-1, order))
            at_least = torch.arange(order.shape[-1], device=key.device) < budget.least
            taken = taken & (more | kept | at_least)
        held = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, taken)
        rests.append(each_head.masked_fill(held.unsqueeze(2), 0).sum(dim=-1).flatten(1, 2))
        order = order.masked_fill(~taken, context).sort(dim=-1).values
        chosen.append(order.masked_fill(order == context, -1).int())
    found = torch.cat(chosen, dim=2) if chosen else query.new_empty(batch, kv_heads, 0, 0).int()
    rest = torch.cat(rests, dim=2) if rests else query.new_empty(batch, heads, 0)
    return found, rest.float()


def _in_any_case(seen: Tensor, first: int, recent: int) -> Tensor:
    """Where the first and the last keys are that a query sees."""
    count = seen.cumsum(dim=-1)
    return seen & ((count <= first) | (count > count[..., -1:] - recent))
