"""The backend `torch`: PyTorch's own operators, with gradients, on any device.

Attention is `scaled_dot_product_attention` where that is fast, else matrix products with a float32
softmax, in blocks of queries.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headwise.ops.attend import products, sdpa
from headwise.ops.attend.blocks import blocks, rows_per_block
from headwise.ops.attend.call import AttentionCall, Problem
from headwise.ops.attend.ragged import attend_ragged
from headwise.ops.backend.protocol import Accepted, Backend, Offer, Verdict, always, densely
from headwise.ops.convolution import reference as convolution
from headwise.ops.indexer import reference as indexer
from headwise.ops.integers import rounding
from headwise.ops.linear_attention import chunked
from headwise.ops.linear_attention import reference as recurrent
from headwise.ops.linear_attention.call import LinearCall
from headwise.ops.modes import FEW_ROWS, are_plain, fit
from headwise.ops.packed import reference as packed
from headwise.ops.sketch import reference as sketch
from headwise.ops.top_keys import reference as search


def _how(problem: Problem) -> str:
    """Which of the two ways serves `problem`, in words."""
    obstacle = sdpa.obstacle(problem)
    if obstacle is not None:
        return f"matrix products with a float32 softmax ({obstacle})"
    words = ["scaled_dot_product_attention"]
    if problem.group_size > 1:
        words.append(f"{problem.group_size} query heads packed per kv head")
    if problem.head_dim != problem.value_dim:
        words.append(f"head dims padded to {max(problem.head_dim, problem.value_dim)}")
    if sdpa.may_be_far(problem):
        words.append(f"matrix products where a row's bias is beyond {sdpa.FAR:,.0f}")
    return ", ".join(words)


def _accepts(problem: Problem) -> Verdict:
    return Accepted("torch", _how(problem) + densely(problem))


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out [B,H,S,V] and, when asked, lse [B,H,S]."""
    call = call.dense()
    if call.options.kv_lengths is not None and call.query.shape[0] > 0:
        return attend_ragged(call, attend)
    problem = call.problem()
    by_sdpa = sdpa.obstacle(problem) is None
    # its causal kernel scales the -inf of what is masked, which is NaN for a scale of 0 or less
    if by_sdpa and sdpa.is_plain_causal(problem) and call.options.scale > 0:
        return sdpa.attend(call, None), None
    if by_sdpa and sdpa.may_be_far(problem):
        rows = rows_per_block(problem, scores_exist=False)
        by_sdpa = not any(map(sdpa.is_far, blocks(call, rows)))
    outs, lses = [], []
    for block in blocks(call, rows_per_block(problem, scores_exist=not by_sdpa)):
        lse = None
        if block.stop <= block.start or call.query.numel() == 0:
            out, lse = products.attend_to_nothing(call, block)
        elif by_sdpa:
            out = sdpa.attend(call, block)
        else:
            out, lse = products.attend(call, block)
        outs.append(out)
        lses += [] if lse is None else [lse]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out, torch.cat(lses, dim=2) if lses else None


def _project(x: Tensor, weight: Tensor, *, up: bool) -> Tensor:
    return x @ (weight if up else weight.transpose(-1, -2))


# Bytes of x, and rows of a weight, that are held in float32 at once: the more bytes, the less often
# a weight is widened.
_BYTES_AT_ONCE, _OUTPUTS_AT_ONCE = 2**25, 512


@functools.cache
def _slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of `dtype` without instructions for it."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _widens(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether products of these plain tensors are faster in float32."""
    return are_plain(
        x, [*weights, *(bias for bias in biases if bias is not None)], _is_slow
    ) and all(fit(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def _is_slow(x: Tensor) -> bool:
    """Whether x has many rows of a dtype that PyTorch is slow in."""
    return _slow(x.dtype) and x.ndim > 0 and x.numel() > FEW_ROWS * x.shape[-1]


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Products of many rows, x [...,E] by weights [F,E], in float32: widened a tile at a time."""
    rows = x.reshape(-1, x.shape[-1])
    outs = [rows.new_empty(len(rows), len(weight)) for weight in weights]
    each = max(1, _BYTES_AT_ONCE // (4 * max(1, x.shape[-1])))
    for start in range(0, len(rows), each):
        stop = start + each
        wide = rows[start:stop].float()
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            for first in range(0, len(weight), _OUTPUTS_AT_ONCE):
                last = first + _OUTPUTS_AT_ONCE
                part = None if bias is None else bias[first:last].float()
                product = functional.linear(wide, weight[first:last].float(), part)
                out[start:stop, first:last] = product
    return tuple(out.view(*x.shape[:-1], -1) for out in outs)


def _reorder(first: Tensor, second: Tensor, index: Tensor, length: int) -> None:
    held = [buffer[:, :, :length] for buffer in (first, second)]
    rows = [each.index_select(0, index) for each in held]
    for each, new in zip(held, rows, strict=True):
        each.copy_(new)


# Tokens up to which one after the other is faster than a chunk.
_FEW_TOKENS = 4


def _linear_attention(call: LinearCall) -> tuple[Tensor, Tensor]:
    """out and state, by the loop for few tokens, in chunks for many."""
    return (recurrent if call.query.shape[2] <= _FEW_TOKENS else chunked).run(call)


BACKEND = Backend(
    "torch",
    always,
    _accepts,
    attend,
    linear=Offer(linear, _widens),
    project=Offer(_project),
    reorder=Offer(_reorder),
    quantize=Offer(rounding.quantize),
    pack=Offer(packed.pack),
    unpack=Offer(packed.unpack),
    index=Offer(indexer.index_topk),
    choose=Offer(sketch.choose_keys),
    top_keys=Offer(search.top_keys),
    linear_attention=Offer(_linear_attention),
    causal_conv1d=Offer(convolution.run),
)
