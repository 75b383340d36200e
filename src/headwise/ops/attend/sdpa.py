"""PyTorch's scaled_dot_product_attention over K heads: what it may serve, and how it is called.

It is taken where it is fast: equal head dims (for many queries the narrower is padded) and nothing
but masks and a bias. K and V are never repeated for the heads of a group, and the grouped path
(`enable_gqa`), which reads each of them once per query head, is never taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.ops.attend.blocks import Block
from headwise.ops.attend.call import AttentionCall, Problem

# Queries from which padding K or V to equal head dims costs less than it saves: SDPA keeps no
# scores for the backward pass.
_PADDED_FROM = 16
# SDPA's backward pass makes the weights anew from score - lse, and the lse is rounded: a row whose
# scores all lie this far from 0 would lose more than 1e-4 of them, one at finfo.min all.
FAR = 1e3
_EXACT = (torch.float32, torch.float64)


def obstacle(problem: Problem) -> str | None:
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


def is_plain_causal(problem: Problem) -> bool:
    """Whether SDPA's own upper-left causal rule is ours: as many queries as keys, nothing else."""
    other = problem.mask or problem.bias or problem.alibi or problem.chosen is not None
    window = problem.window is not None and problem.window < problem.context
    square = problem.query_length == problem.context
    return problem.causal and square and problem.context > 0 and not other and not window


def may_be_far(problem: Problem) -> bool:
    """Whether a row may see nothing but keys with a bias, or ALiBi, beyond `FAR`.

    With ALiBi alone a causal query sees its own key, at a distance of 0.
    """
    alibi = problem.alibi and (problem.mask or not problem.causal)
    return problem.needs_grad and (problem.bias is not None or alibi)


def is_far(block: Block) -> bool:
    """Whether all that some row may see has a bias beyond `FAR`, or that cannot be told."""
    if block.bias is None or block.stop <= block.start:
        return False
    bias = block.bias.detach()
    if torch.compiler.is_compiling() or (bias.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    if block.visible is not None:
        bias = bias.masked_fill(~block.visible, float("-inf"))
    peak = bias.amax(dim=-1)
    try:
        return bool((peak.isfinite() & (peak.abs() > FAR)).any())
    except RuntimeError:  # traced, batched by vmap, or without data
        return True


def attend(call: AttentionCall, block: Block | None) -> Tensor:
    """One block, or the whole call by SDPA's own causal rule: out [B,H,rows,V]."""
    query, key, value = call.query, call.key, call.value
    if block is not None:
        query = query[:, :, block.rows]
        key, value = key[:, :, block.keys], value[:, :, block.keys]
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
        query, key, value, attn_mask=mask, is_causal=block is None, scale=call.options.scale
    )
    return out.reshape(batch, heads, rows, value.shape[-1])[..., :wanted]


def _additive(block: Block, dtype: torch.dtype) -> Tensor | None:
    if block.bias is None:
        return block.visible
    bias = block.bias.to(dtype)
    return bias if block.visible is None else bias.masked_fill(~block.visible, float("-inf"))
