"""Attention on PyTorch's own operators, with gradients, on any device.

Two ways through. `scaled_dot_product_attention` where it is fast: equal head dims (for many
queries the narrower is padded) and nothing but masks and a bias; K and V are never repeated for the
heads of a group, and the grouped path (`enable_gqa`), which reads each of them once per query head,
is never taken. Otherwise matrix products with a float32 softmax, in blocks of queries, so that the
scores never exist in full.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.ops._call import AttentionCall, Problem
from headwise.ops._reference import positions

# Elements of one block of scores (64 MiB in float32).
_BLOCK_SCORES = 2**24
# Queries in one block where causality or a window lets whole blocks of keys be skipped.
_BLOCK_ROWS = 512
# Queries from which padding K or V to equal head dims costs less than it saves: SDPA keeps no
# scores for the backward pass.
_PADDED_FROM = 16
# Elements of K or V that are widened to float32 at a time (8 MiB: they stay in the last cache).
_WIDEN = 2**21
# SDPA's backward pass makes the weights anew from score - lse, and the lse is rounded: a row whose
# scores all lie this far from 0 would lose more than 1e-4 of them, one at finfo.min all.
_FAR = 1e3
_EXACT = (torch.float32, torch.float64)


def how(problem: Problem) -> str:
    """Which of the two ways serves `problem`, in words."""
    obstacle = _sdpa_obstacle(problem)
    if obstacle is None:
        packed = f", {problem.group_size} query heads packed per kv head"
        padded = f", head dims padded to {max(problem.head_dim, problem.value_dim)}"
        far = f", matrix products where a row's bias is beyond {_FAR:,.0f}"
        return (
            "scaled_dot_product_attention"
            + (packed if problem.group_size > 1 else "")
            + (padded if problem.head_dim != problem.value_dim else "")
            + (far if _may_be_far(problem) else "")
        )
    return f"matrix products with a float32 softmax ({obstacle})"


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out [B,H,S,V] and, when asked, lse [B,H,S]."""
    if call.kv_lengths is not None and call.query.shape[0] > 0:
        return _attend_ragged(call)
    problem = call.problem()
    by_sdpa = _sdpa_obstacle(problem) is None
    # its causal kernel scales the -inf of what is masked, which is NaN for a scale of 0 or less
    if by_sdpa and _is_plain_causal(problem) and call.scale > 0:
        return _sdpa(call, call.query, call.key, call.value, None, causal=True), None
    if by_sdpa and _may_be_far(problem):
        by_sdpa = not any(map(_is_far, _blocks(call, _rows_per_block(problem, True))))
    outs, lses = [], []
    for block in _blocks(call, _rows_per_block(problem, by_sdpa)):
        if block.stop <= block.start or call.query.numel() == 0:
            out, lse = _nothing_to_see(call, block)
        elif by_sdpa:
            query, key, value = call.query[:, :, block.rows], call.key, call.value
            keys = slice(block.start, block.stop)
            out, lse = _sdpa(call, query, key[:, :, keys], value[:, :, keys], block), None
        else:
            out, lse = _products(call, block)
        outs.append(out)
        lses.append(lse)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    if not call.return_lse:
        return out, None
    return out, torch.cat([lse for lse in lses if lse is not None], dim=2)


def _sdpa_obstacle(problem: Problem) -> str | None:
    """Why scaled_dot_product_attention cannot or should not serve `problem`; None if it can."""
    half = problem.dtype not in _EXACT
    if problem.tangents:
        return "tangents"
    if problem.softcap:
        return "softcap"
    if problem.sinks:
        return "sinks"
    if problem.lse:
        return "log-sum-exp asked for"
    if problem.split_key:
        return "latent and rope key held apart"
    if problem.head_dim != problem.value_dim and problem.query_length < _PADDED_FROM:
        # it serves them on its unfused path, at a tenth of the speed
        return f"head dims {problem.head_dim} and {problem.value_dim} differ"
    if half and problem.alibi:
        return "ALiBi would be rounded to half precision"
    if half and problem.bias not in (None, problem.dtype):
        return f"bias would be rounded to {problem.dtype}"
    return None


def _is_plain_causal(problem: Problem) -> bool:
    """Whether SDPA's own upper-left causal rule is ours: as many queries as keys, nothing else."""
    other = problem.mask or problem.bias or problem.alibi
    window = problem.window is not None and problem.window < problem.context
    square = problem.query_length == problem.context
    return problem.causal and square and problem.context > 0 and not other and not window


@dataclass(frozen=True)
class _Block:
    """Queries `rows` against keys start..stop, with what is visible and added there."""

    rows: slice
    start: int
    stop: int
    visible: Tensor | None
    bias: Tensor | None


def _may_be_far(problem: Problem) -> bool:
    """Whether a row may see nothing but keys with a bias, or ALiBi, beyond `_FAR`.

    With ALiBi alone a causal query sees its own key, at a distance of 0.
    """
    alibi = problem.alibi and (problem.mask or not problem.causal)
    return problem.needs_grad and (problem.bias is not None or alibi)


def _is_far(block: _Block) -> bool:
    """Whether all that some row may see has a bias beyond `_FAR`, or that cannot be told."""
    if block.bias is None or block.stop <= block.start:
        return False
    bias = block.bias.detach()
    if torch.compiler.is_compiling() or (bias.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    if block.visible is not None:
        bias = bias.masked_fill(~block.visible, float("-inf"))
    peak = bias.amax(dim=-1)
    try:
        return bool((peak.isfinite() & (peak.abs() > _FAR)).any())
    except RuntimeError:  # traced, batched by vmap, or without data
        return True


def _rows_per_block(problem: Problem, by_sdpa: bool) -> int:
    heads = 1 if by_sdpa else problem.heads
    limit = _BLOCK_SCORES // max(1, problem.batch * heads * problem.context)
    if problem.causal and problem.query_length > 1:
        limit = min(limit, _BLOCK_ROWS)
    return max(1, min(limit, problem.query_length))


def _blocks(call: AttentionCall, rows: int) -> Iterator[_Block]:
    length, context = call.query.shape[2], call.key.shape[2]
    offset = context - length
    for first in range(0, max(length, 1), rows):
        last = min(first + rows, length) - 1
        start, stop = 0, context
        if call.causal:
            stop = max(0, last + offset + 1)
        if call.window is not None:
            start = max(0, first + offset - call.window + 1)
        here = slice(first, last + 1)
        yield _Block(
            rows=here,
            start=start,
            stop=stop,
            visible=_visible(call, here, start, stop),
            bias=_bias(call, here, start, stop),
        )


def _visible(call: AttentionCall, rows: slice, start: int, stop: int) -> Tensor | None:
    """Which keys start..stop the queries `rows` may see, broadcastable; None if all."""
    offset = call.key.shape[2] - call.query.shape[2]
    visible = None
    if call.causal and stop > start:
        device = call.query.device
        position = torch.arange(rows.start + offset, rows.stop + offset, device=device).view(-1, 1)
        key_position = torch.arange(start, stop, device=device)
        if rows.start + offset < stop - 1:
            visible = key_position <= position
        if call.window is not None and start <= rows.stop - 1 + offset - call.window:
            recent = key_position > position - call.window
            visible = recent if visible is None else visible & recent
        if visible is not None:
            visible = visible.view(1, 1, *visible.shape)
    if call.mask is None:
        return visible
    mask = _part(call.mask, rows, start, stop)
    return mask if visible is None else mask & visible


def _bias(call: AttentionCall, rows: slice, start: int, stop: int) -> Tensor | None:
    """What is added to the scores of this block, in the query's precision or float32."""
    bias = None if call.bias is None else _part(call.bias, rows, start, stop)
    if call.alibi_slopes is None:
        return bias
    exact = torch.promote_types(call.query.dtype, torch.float32)
    offset, device = call.key.shape[2] - call.query.shape[2], call.query.device
    position = torch.arange(rows.start + offset, rows.stop + offset, device=device).view(-1, 1)
    distance = torch.arange(start, stop, device=device) - position
    alibi = call.alibi_slopes.to(exact).view(1, -1, 1, 1) * distance
    return alibi if bias is None else bias + alibi


def _part(tensor: Tensor, rows: slice, start: int, stop: int) -> Tensor:
    """The block of a tensor that broadcasts to [B,H,S,L]."""
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, rows]
    return tensor[..., start:stop] if tensor.shape[3] > 1 else tensor


def _nothing_to_see(call: AttentionCall, block: _Block) -> tuple[Tensor, Tensor | None]:
    query = call.query[:, :, block.rows]
    # the empty sum keeps the result on the graph, so that a backward pass through it works
    zero = query[..., :0].sum(dim=-1, keepdim=True)
    out = query.new_zeros(*query.shape[:3], call.value.shape[3]) + zero
    if not call.return_lse:
        return out, None
    exact = torch.promote_types(query.dtype, torch.float32)
    if call.sinks is not None:
        return out, call.sinks.to(exact).view(1, -1, 1).expand(query.shape[:3])
    return out, torch.full(query.shape[:3], float("-inf"), dtype=exact, device=query.device)


def _sdpa(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: _Block | None,
    causal: bool = False,
) -> Tensor:
    """scaled_dot_product_attention over K heads, each read where it lies."""
    mask = None if block is None else _additive(block, query.dtype)
    wanted, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing > 0:
        value = F.pad(value, (0, missing))
    elif missing < 0:
        query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if group == 1:
        pass
    elif rows == 1:
        # one row per query head of the group
        query = query.reshape(batch, kv_heads, group, head_dim)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], kv_heads, group, mask.shape[3])
    else:
        # kv heads become the batch, and the group its heads, with a stride of 0 over K and V
        query = query.reshape(batch * kv_heads, group, rows, head_dim)
        key = key.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
        value = value.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.expand(batch, -1, -1, -1).reshape(-1, group, *mask.shape[2:])
        elif mask is not None and mask.shape[0] > 1:
            mask = mask.repeat_interleave(kv_heads, dim=0)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=call.scale
    )
    return out.reshape(batch, heads, rows, value.shape[-1])[..., :wanted]


def _additive(block: _Block, dtype: torch.dtype) -> Tensor | None:
    if block.bias is None:
        return block.visible
    bias = block.bias.to(dtype)
    return bias if block.visible is None else bias.masked_fill(~block.visible, float("-inf"))


def _products(call: AttentionCall, block: _Block) -> tuple[Tensor, Tensor | None]:
    """One block by matrix products: out [B,H,rows,V] and lse [B,H,rows]."""
    exact = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, block.rows]
    batch, heads, rows = query.shape[:3]
    kv_heads, keys = call.key.shape[1], slice(block.start, block.stop)
    packed = (batch, kv_heads, heads // kv_heads * rows, -1)
    # scaling the few queries is cheaper than scaling the scores
    scaled = (call.scale * query.to(exact)).reshape(packed)
    key, value = call.key[:, :, keys], call.value[:, :, keys]
    if call.value is call.key and not _widen_by_parts(scaled, key):
        # the latents of absorbed MLA are both: widen them once
        key = value = key.to(exact)
    score = _scores(scaled, key)
    if call.query_tail is not None and call.key_tail is not None:
        tail = call.scale * call.query_tail[:, :, block.rows].to(exact)
        score = score + _scores(tail.reshape(packed), call.key_tail[:, :, keys])
    score = score.reshape(batch, heads, rows, -1)
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    if block.bias is not None:
        score = score + block.bias.to(exact)
    if block.visible is not None:
        score = score.masked_fill(~block.visible, float("-inf"))
    if block.visible is None and block.bias is None and call.sinks is None and not call.return_lse:
        # no row can be empty, so PyTorch's own softmax will do
        out = _weighted(torch.softmax(score, dim=-1).reshape(packed), value)
        return out.reshape(batch, heads, rows, -1).to(call.query.dtype), None
    # the shift cancels out, so it needs no gradient; a row that sees nothing is shifted by 0
    peak = score.detach().amax(dim=-1, keepdim=True)
    sink = None if call.sinks is None else call.sinks.to(exact).view(1, heads, 1, 1)
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
    if not call.return_lse:
        return out, None
    return out, (peak + torch.log(total)).masked_fill(empty, float("-inf")).squeeze(-1)


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


def _attend_ragged(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Each sequence against its own keys only, so that no byte past a length is read."""
    assert call.kv_lengths is not None
    if torch.compiler.is_compiling():
        return attend(_ragged_as_mask(call))
    outs, lses = [], []
    for index, length in enumerate(call.kv_lengths.tolist()):
        one, keys = slice(index, index + 1), slice(0, length)
        out, lse = attend(
            replace(
                call,
                query=call.query[one],
                query_tail=None if call.query_tail is None else call.query_tail[one],
                key=call.key[one, :, keys],
                key_tail=None if call.key_tail is None else call.key_tail[one, :, keys],
                value=call.value[one, :, keys],
                mask=_of_sequence(call.mask, index, length),
                bias=_of_sequence(call.bias, index, length),
                kv_lengths=None,
            )
        )
        outs.append(out)
        lses.append(lse)
    kept = [lse for lse in lses if lse is not None]
    return torch.cat(outs), torch.cat(kept) if kept else None


def _of_sequence(tensor: Tensor | None, index: int, length: int) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape[0] > 1:
        tensor = tensor[index : index + 1]
    return tensor[..., :length] if tensor.shape[3] > 1 else tensor


def _ragged_as_mask(call: AttentionCall) -> AttentionCall:
    """The same call for a compiler, which cannot read lengths: masked, and zeros past a length."""
    assert call.kv_lengths is not None
    position, key_position = positions(call)
    valid = key_position < call.kv_lengths.view(-1, 1, 1, 1)
    visible = valid
    if call.causal:
        visible = visible & (key_position <= position)
    if call.window is not None:
        visible = visible & (key_position > position - call.window)
    if call.mask is not None:
        visible = visible & call.mask
    bias = call.bias
    if call.alibi_slopes is not None:
        exact = torch.promote_types(call.query.dtype, torch.float32)
        alibi = call.alibi_slopes.to(exact).view(1, -1, 1, 1) * (key_position - position)
        bias = alibi if bias is None else bias + alibi
    past = ~valid.transpose(-1, -2)
    tail = call.key_tail
    return replace(
        call,
        key=call.key.masked_fill(past, 0.0),
        key_tail=None if tail is None else tail.masked_fill(past, 0.0),
        value=call.value.masked_fill(past, 0.0),
        causal=False,
        window=None,
        alibi_slopes=None,
        bias=bias,
        mask=visible,
        kv_lengths=None,
    )
