"""A call cut into blocks of queries, so that the scores never exist in full."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall, Problem
from headwise.ops.attend.chosen import chosen_mask
from headwise.ops.attend.visible import part_of, visible_keys

# Elements of one block of scores (64 MiB in float32).
_BLOCK_SCORES = 2**24
# Queries in one block where causality or a window lets whole blocks of keys be skipped.
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Block:
    """Queries `rows` against keys start..stop, with what is visible and added there.

    visible: boolean, broadcasts to [B,H,rows,keys]; None where all is. bias: in the query's
    precision or float32; None where nothing is added.
    """

    rows: slice
    start: int
    stop: int
    visible: Tensor | None
    bias: Tensor | None

    @property
    def keys(self) -> slice:
        """The keys that some query of the block sees."""
        return slice(self.start, self.stop)


def rows_per_block(problem: Problem, *, scores_exist: bool) -> int:
    """Queries of a block; `scores_exist`: of every head, not inside a kernel alone."""
    heads = problem.heads if scores_exist or problem.chosen is not None else 1
    limit = _BLOCK_SCORES // max(1, problem.batch * heads * problem.context)
    if problem.causal and problem.query_length > 1:
        limit = min(limit, _BLOCK_ROWS)
    return max(1, min(limit, problem.query_length))


def blocks(call: AttentionCall, rows: int) -> Iterator[Block]:
    """Blocks of `rows` queries, and of the keys that causality and the window leave of them."""
    length, context = call.query.shape[2], call.key.shape[2]
    window, offset = call.options.window, context - length
    for first in range(0, max(length, 1), rows):
        last = min(first + rows, length) - 1
        start, stop = 0, context
        if call.options.causal:
            stop = max(0, last + offset + 1)
        if window is not None:
            start = max(0, first + offset - window + 1)
        here = slice(first, last + 1)
        yield Block(
            rows=here,
            start=start,
            stop=stop,
            visible=_visible(call, here, start, stop),
            bias=_bias(call, here, start, stop),
        )


def _visible(call: AttentionCall, rows: slice, start: int, stop: int) -> Tensor | None:
    options, offset = call.options, call.key.shape[2] - call.query.shape[2]
    visible = None
    if options.causal and stop > start:
        # the rule costs nothing where it hides nothing from any row
        late = rows.start + offset < stop - 1
        reaches = start <= rows.stop - 1 + offset - (options.window or stop + 1)
        position, key_position = _positions(call, rows, start, stop)
        visible = visible_keys(
            position, key_position, causal=late, window=options.window if reaches else None
        )
        visible = None if visible is None else visible.view(1, 1, *visible.shape)
    chosen = chosen_mask(options, call.query.shape[1], call.key.shape[2], rows)
    for mask in (options.mask, chosen):
        if mask is not None:
            mask = mask if mask is chosen else part_of(mask, 2, rows)
            part = part_of(mask, 3, slice(start, stop))
            visible = part if visible is None else part & visible
    return visible


def _bias(call: AttentionCall, rows: slice, start: int, stop: int) -> Tensor | None:
    bias, slopes = call.options.bias, call.options.alibi_slopes
    bias = None if bias is None else part_of(part_of(bias, 2, rows), 3, slice(start, stop))
    if slopes is None:
        return bias
    position, key_position = _positions(call, rows, start, stop)
    exact = torch.promote_types(call.query.dtype, torch.float32)
    alibi = slopes.to(exact).view(1, -1, 1, 1) * (key_position - position)
    return alibi if bias is None else bias + alibi


def _positions(call: AttentionCall, rows: slice, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Of the queries, [rows, 1], and of the keys."""
    offset, device = call.key.shape[2] - call.query.shape[2], call.query.device
    position = torch.arange(rows.start + offset, rows.stop + offset, device=device)
    return position.view(-1, 1), torch.arange(start, stop, device=device)
