"""Attention of one block by matrix products, with a float32 softmax and every option."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headwise.ops.attend.blocks import Block
from headwise.ops.attend.call import AttentionCall

# Elements of K or V that are widened to float32 at a time (8 MiB: they stay in the last cache).
_WIDEN = 2**21


def attend(call: AttentionCall, block: Block) -> tuple[Tensor, Tensor | None]:
    """out [B,H,rows,V] and, when asked, lse [B,H,rows]."""
    options = call.options
    exact = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, block.rows]
    batch, heads, rows = query.shape[:3]
    kv_heads = call.key.shape[1]
    packed = (batch, kv_heads, heads // kv_heads * rows, -1)
    # scaling the few queries is cheaper than scaling the scores
    scaled = (options.scale * query.to(exact)).reshape(packed)
    key, value = call.key[:, :, block.keys], call.value[:, :, block.keys]
    if call.value is call.key and not _widen_by_parts(scaled, key):
        # the latents of absorbed MLA are both: widen them once
        key = value = key.to(exact)
    score = _scores(scaled, key)
    if call.query_tail is not None and call.key_tail is not None:
        tail = options.scale * call.query_tail[:, :, block.rows].to(exact)
        score = score + _scores(tail.reshape(packed), call.key_tail[:, :, block.keys])
    score = score.reshape(batch, heads, rows, -1)
    if options.softcap is not None:
        score = options.softcap * torch.tanh(score / options.softcap)
    if block.bias is not None:
        score = score + block.bias.to(exact)
    if block.visible is not None:
        score = score.masked_fill(~block.visible, float("-inf"))
    sinks, lse = options.sinks, options.return_lse
    if block.visible is None and block.bias is None and sinks is None and not lse:
        # no row can be empty, so PyTorch's own softmax will do
        out = _weighted(torch.softmax(score, dim=-1).reshape(packed), value)
        return out.reshape(batch, heads, rows, -1).to(call.query.dtype), None
    # the shift cancels out, so it needs no gradient; a row that sees nothing is shifted by 0
    peak = score.detach().amax(dim=-1, keepdim=True)
    sink = None if sinks is None else sinks.to(exact).view(1, heads, 1, 1)
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)
    weight = torch.exp(score - peak)
    total = weight.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    out = _weighted(weight.reshape(packed), value).reshape(batch, heads, rows, -1)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = (out / total).to(call.query.dtype)
    if not lse:
        return out, None
    return out, (peak + torch.log(total)).masked_fill(empty, float("-inf")).squeeze(-1)


def attend_to_nothing(call: AttentionCall, block: Block) -> tuple[Tensor, Tensor | None]:
    """A block whose queries see no key: 0, and -inf or the sink."""
    query, sinks = call.query[:, :, block.rows], call.options.sinks
    # the empty sum keeps the result on the graph, so that a backward pass through it works
    zero = query[..., :0].sum(dim=-1, keepdim=True)
    out = query.new_zeros(*query.shape[:3], call.value.shape[3]) + zero
    if not call.options.return_lse:
        return out, None
    exact = torch.promote_types(query.dtype, torch.float32)
    if sinks is not None:
        return out, sinks.to(exact).view(1, -1, 1).expand(query.shape[:3])
    return out, torch.full(query.shape[:3], float("-inf"), dtype=exact, device=query.device)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """query [B,K,rows,D] times key [B,K,L,D], in the query's precision: [B,K,rows,L]."""
    if not _widen_by_parts(query, key):
        return query @ key.to(query.dtype).transpose(-1, -2)
    score = query.new_empty(*query.shape[:3], key.shape[2])
    for part in _parts(key):
        score[..., part] = query @ key[:, :, part].to(query.dtype).transpose(-1, -2)
    return score


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight [B,K,rows,L] times value [B,K,L,V], in the weight's precision: [B,K,rows,V]."""
    if not _widen_by_parts(weight, value):
        return weight @ value.to(weight.dtype)
    out = weight.new_zeros(*weight.shape[:3], value.shape[3])
    for part in _parts(value):
        out += weight[..., part] @ value[:, :, part].to(weight.dtype)
    return out


def _widen_by_parts(wide: Tensor, narrow: Tensor) -> bool:
    """Whether to convert `narrow` in parts that stay in the processor's cache."""
    if narrow.dtype == wide.dtype or narrow.numel() <= _WIDEN or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and (wide.requires_grad or narrow.requires_grad))


def _parts(tensor: Tensor) -> Iterator[slice]:
    step = max(1, _WIDEN // (tensor.shape[0] * tensor.shape[1] * tensor.shape[3]))
    for first in range(0, tensor.shape[2], step):
        yield slice(first, min(first + step, tensor.shape[2]))
