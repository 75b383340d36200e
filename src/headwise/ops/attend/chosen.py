"""Keys that are chosen for each query, as a mask: for operators that do not gather them."""

from dataclasses import replace

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall, Options


def chosen_mask(
    options: Options, heads: int, context: int, rows: slice = slice(None)
) -> Tensor | None:
    """True at the keys chosen for the queries `rows`, [B,1|H,rows,L]; None where none are chosen.

    >>> import torch
    >>> indices = torch.tensor([[[[2, 0, -1, 2]]]], dtype=torch.int32)
    >>> chosen_mask(Options(scale=1.0, indices=indices), 1, 4).tolist()
    [[[[True, False, True, False]]]]
    >>> blocks = Options(scale=1.0, block_indices=indices, block_size=2)
    >>> chosen_mask(blocks, 1, 5).tolist()
    [[[[True, True, False, False, True]]]]
    """
    chosen = options.chosen
    if chosen is None:
        return None
    size = options.block_size or 1
    blocks, chosen = -(-context // size), chosen[:, :, rows].long()
    # what does not exist falls into a column behind the last; where values can be looked at, it was
    # refused
    column = chosen.masked_fill((chosen < 0) | (chosen >= blocks), blocks)
    mask = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.device)
    mask = mask.scatter(-1, column, True)[..., :blocks]
    if size > 1:
        mask = mask.repeat_interleave(min(size, context), dim=-1)[..., :context]
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def of_sequence(options: Options, sequence: slice, length: int) -> Options:
    """The choices of one sequence of so many keys; those behind it are none."""
    size = options.block_size or 1

    def own(chosen: Tensor | None) -> Tensor | None:
        if chosen is None:
            return None
        part = chosen[sequence]
        return part.masked_fill(part * size >= length, -1)

    indices, blocks = own(options.indices), own(options.block_indices)
    return replace(options, indices=indices, block_indices=blocks)


def without(options: Options, mask: Tensor) -> Options:
    """The options with `mask` in place of chosen keys."""
    return replace(options, mask=mask, indices=None, block_indices=None, block_size=None)


def masked_options(options: Options, heads: int, context: int) -> Options:
    """The same options with a mask in place of chosen keys."""
    mask = chosen_mask(options, heads, context)
    if mask is None:
        return options
    return without(options, mask if options.mask is None else mask & options.mask)


def masked(call: AttentionCall) -> AttentionCall:
    """The same call with a mask in place of chosen keys."""
    options = masked_options(call.options, call.query.shape[1], call.sizes()[5])
    return call if options is call.options else replace(call, options=options)
