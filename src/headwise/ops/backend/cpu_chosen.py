"""Chosen keys in the C++ kernels: gathered query by query, or all of them under a mask.

Gathering reads the keys of one query for its heads alone. For many queries that choose much of a
context, tiles of queries over all keys do less work, though most of it is hidden.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall, contiguous_rows
from headwise.ops.attend.chosen import chosen_mask, without
from headwise.ops.attend.visible import part_of, visible_keys
from headwise.ops.backend import cpu_library, cpu_step
from headwise.ops.backend.protocol import Offer
from headwise.ops.sketch.call import ChoiceCall
from headwise.ops.views import KV, QuantKV

# Bytes of a mask that exist at once.
_MASK_BYTES = 2**24
# What a key costs beside its products, and what it costs for each query head, where it is gathered
# and where it is hidden or seen: measured, head dims of 128 and 512, 1 to 128 heads.
_GATHERED, _MASKED = (15.0, 1.0), (3.0, 1.2)

# What csrc/operators/index_topk.cpp, choose_keys.cpp and top_keys.cpp accept.
_MOST_DIM = 576

Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


def gathers(call: AttentionCall) -> bool:
    """Whether gathering does less work than a mask, counting products."""
    options = call.options
    assert options.chosen is not None
    own_mask = options.mask is not None and options.mask.shape[1] > 1
    if own_mask or options.bias is not None or options.alibi_slopes is not None:
        return False  # a list serves all heads of a group, and does not know where its keys are
    _, heads, length, _, kv_heads, context, _ = call.sizes()
    chosen = min(context, options.chosen.shape[3] * (options.block_size or 1))
    group = heads // kv_heads
    seen = context - (length - 1) / 2  # causality, or a mask in its place, hides whole blocks
    gathered, masked = (key + row * group for key, row in (_GATHERED, _MASKED))
    return length == 1 or chosen * gathered < seen * masked


def attend_masked(call: AttentionCall, attend: Attend) -> tuple[Tensor, Tensor | None]:
    """The call by `attend` without chosen keys, a part of the queries at a time."""
    options = call.options
    assert options.chosen is not None
    lists = options.chosen.shape[1]
    parts = [call] if lists == 1 else [_of_head(call, head) for head in range(lists)]
    done = [_in_rows(part, attend) for part in parts]
    out = torch.cat([out for out, _ in done], dim=1) if len(done) > 1 else done[0][0]
    if not options.return_lse:
        return out, None
    return out, torch.cat([lse for _, lse in done if lse is not None], dim=1)


def _in_rows(call: AttentionCall, attend: Attend) -> tuple[Tensor, Tensor | None]:
    options, (batch, heads, length, *_, context, _) = call.options, call.sizes()
    device = call.query.device
    last = torch.tensor([context]) if options.kv_lengths is None else options.kv_lengths
    start = last.to(device).view(-1, 1, 1, 1) - length
    every = torch.arange(context, device=device).view(1, 1, 1, -1)
    each = max(1, _MASK_BYTES // max(1, batch * context))
    if options.alibi_slopes is not None:
        each = max(1, length)  # the kernel counts positions from the last query
    outs, lses = [], []
    for first in range(0, max(length, 1), each):
        rows = slice(first, min(first + each, length))
        mask = chosen_mask(options, heads, context, rows)
        assert mask is not None
        position = start + torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1)
        seen = visible_keys(position, every, causal=options.causal, window=options.window)
        mask = mask if seen is None else mask & seen
        if options.mask is not None:
            mask = mask & part_of(options.mask, 2, rows)
        bias = None if options.bias is None else part_of(options.bias, 2, rows)
        own = replace(without(options, mask), causal=False, window=None, bias=bias)
        tail = call.query_tail
        out, lse = attend(
            replace(
                call,
                query=call.query[:, :, rows],
                query_tail=None if tail is None else tail[:, :, rows],
                options=own,
            )
        )
        outs.append(out)
        lses += [] if lse is None else [lse]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out, torch.cat(lses, dim=2) if lses else None


def _of_head(call: AttentionCall, head: int) -> AttentionCall:
    """The call of one kv head and its query heads."""
    _, heads, _, _, kv_heads, _, _ = call.sizes()
    group, options, one = heads // kv_heads, call.options, slice(head, head + 1)
    queries = slice(head * group, (head + 1) * group)
    kv = None if call.kv is None else _view_of_head(call.kv, one)
    return replace(
        call,
        query=call.query[:, queries],
        query_tail=None if call.query_tail is None else call.query_tail[:, queries],
        key=call.key[:, one],
        value=call.value[:, one],
        key_tail=None if call.key_tail is None else call.key_tail[:, one],
        kv=kv,
        options=replace(
            options,
            sinks=None if options.sinks is None else options.sinks[queries],
            alibi_slopes=None if options.alibi_slopes is None else options.alibi_slopes[queries],
            bias=None if options.bias is None else part_of(options.bias, 1, queries),
            mask=None if options.mask is None else part_of(options.mask, 1, queries),
            indices=None if options.indices is None else options.indices[:, one],
            block_indices=None if options.block_indices is None else options.block_indices[:, one],
        ),
    )


def _view_of_head(kv: KV, one: slice) -> KV:
    key, value = kv.key[:, one], kv.value[:, one]
    if not isinstance(kv, QuantKV):
        return replace(kv, key=key, value=value)
    scales = kv.key_scales[:, one], kv.value_scales[:, one]
    return replace(kv, key=key, value=value, key_scales=scales[0], value_scales=scales[1])


def _indexes(query: Tensor, key: Tensor) -> bool:
    served = query.device.type == "cpu" and query.dtype in cpu_step.DTYPES
    return served and query.shape[-1] <= _MOST_DIM and not cpu_library.ready()


def _index_topk(
    query: Tensor, key: Tensor, weights: Tensor, top: int, *, causal: bool, mask: Tensor | None
) -> Tensor:
    query, key, weights = map(contiguous_rows, (query, key, weights.float()))
    chosen: Tensor = torch.ops.headwise.index_topk.default(
        query, key, weights, mask, causal, top, cpu_library.chosen_level()
    )
    return chosen


INDEX = Offer(_index_topk, _indexes)


def _top_keys(query: Tensor, key: Tensor, top: int, *, mask: Tensor | None) -> Tensor:
    chosen: Tensor = torch.ops.headwise.top_keys.default(
        contiguous_rows(query), contiguous_rows(key), mask, top, cpu_library.chosen_level()
    )
    return chosen


TOP_KEYS = Offer(_top_keys, _indexes)


def _chooses(call: ChoiceCall) -> bool:
    query = call.query
    on_cpu = query.device.type == "cpu" and query.dtype in cpu_step.DTYPES
    return on_cpu and query.shape[-1] <= _MOST_DIM and not cpu_library.ready()


def _choose_keys(call: ChoiceCall) -> tuple[Tensor, Tensor]:
    sketch, budget = call.sketch, call.budget
    table, lengths = sketch.page_table, sketch.lengths
    try:
        chosen, rest = torch.ops.headwise.choose_keys.default(
            *map(contiguous_rows, (call.query, sketch.key, sketch.key_scales)),
            None if table is None else contiguous_rows(table),
            sketch.context,
            None if lengths is None else lengths.long().contiguous(),
            call.mask,
            None if call.sinks is None else call.sinks.float().contiguous(),
            call.causal,
            call.scale,
            call.softcap or 0.0,
            budget.first,
            budget.recent,
            budget.least,
            budget.most,
            -1.0 if budget.mass is None else budget.mass,
            cpu_library.chosen_level(),
        )
    except RuntimeError:
        sketch.check_pages()  # pages that do not exist are found there
        raise
    return chosen, rest


CHOOSE = Offer(_choose_keys, _chooses)
