"""Sequences of unequal lengths, for operators that know none: one after the other, or as a mask."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall
from headwise.ops.attend.chosen import masked, of_sequence
from headwise.ops.attend.reference import positions
from headwise.ops.attend.visible import visible_keys

Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


def attend_ragged(call: AttentionCall, attend: Attend) -> tuple[Tensor, Tensor | None]:
    """Each sequence against its own keys only, so that no byte past a length is read."""
    if torch.compiler.is_compiling():
        return attend(_as_mask(masked(call)))
    assert call.options.kv_lengths is not None
    outs, lses = [], []
    for index, length in enumerate(call.options.kv_lengths.tolist()):
        out, lse = attend(_sequence(call, index, length))
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs), torch.cat(lses) if lses else None


def _sequence(call: AttentionCall, index: int, length: int) -> AttentionCall:
    one, keys = slice(index, index + 1), slice(0, length)
    options = of_sequence(call.options, one, length)
    return replace(
        call,
        query=call.query[one],
        query_tail=None if call.query_tail is None else call.query_tail[one],
        key=call.key[one, :, keys],
        key_tail=None if call.key_tail is None else call.key_tail[one, :, keys],
        value=call.value[one, :, keys],
        options=replace(
            options,
            mask=_of_sequence(options.mask, index, length),
            bias=_of_sequence(options.bias, index, length),
            kv_lengths=None,
        ),
    )


def _of_sequence(tensor: Tensor | None, index: int, length: int) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape[0] > 1:
        tensor = tensor[index : index + 1]
    return tensor[..., :length] if tensor.shape[3] > 1 else tensor


def _as_mask(call: AttentionCall) -> AttentionCall:
    """The same call for a compiler, which cannot read lengths: masked, and zeros past a length."""
    options = call.options
    assert options.kv_lengths is not None
    position, key_position = positions(call)
    valid = key_position < options.kv_lengths.view(-1, 1, 1, 1)
    seen = visible_keys(position, key_position, causal=options.causal, window=options.window)
    visible = valid if seen is None else valid & seen
    if options.mask is not None:
        visible = visible & options.mask
    bias = options.bias
    if options.alibi_slopes is not None:
        exact = torch.promote_types(call.query.dtype, torch.float32)
        slopes = options.alibi_slopes.to(exact).view(1, -1, 1, 1)
        alibi = slopes * (key_position - position)
        bias = alibi if bias is None else bias + alibi
    past = ~valid.transpose(-1, -2)
    tail = call.key_tail
    return replace(
        call,
        key=call.key.masked_fill(past, 0.0),
        key_tail=None if tail is None else tail.masked_fill(past, 0.0),
        value=call.value.masked_fill(past, 0.0),
        options=replace(
            options,
            causal=False,
            window=None,
            alibi_slopes=None,
            bias=bias,
            mask=visible,
            kv_lengths=None,
        ),
    )
