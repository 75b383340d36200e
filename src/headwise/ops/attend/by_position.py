"""Keys with positions of their own, as ranks of a split context have them, in plain calls.

No backend but the definition knows positions: what a query sees of such keys is a run of them, and
where the queries of a part do not all see the same, a mask of the part.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall
from headwise.ops.attend.visible import part_of, visible_keys
from headwise.ops.views import QuantKV

# Queries of a part: its mask has so many rows.
_ROWS = 512

Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


def attend_by_position(call: AttentionCall, attend: Attend) -> tuple[Tensor, Tensor | None]:
    """out [B,H,S,V] and, when asked, lse [B,H,S]: by `attend`, which takes no positions."""
    done = [attend(part) for part in parts(call)]
    if len(done) == 1:
        return done[0]
    lses = [lse for _, lse in done if lse is not None]
    return torch.cat([out for out, _ in done], dim=2), torch.cat(lses, dim=2) if lses else None


def parts(call: AttentionCall) -> Iterator[AttentionCall]:
    """The call's queries, some at a time, with the keys that any of them sees."""
    options, queries = call.options, call.query.shape[2]
    assert options.key_positions is not None
    positions = options.key_positions.cpu()
    for first in range(0, max(1, queries), _ROWS):
        rows = slice(first, min(first + _ROWS, queries))
        query = torch.arange(rows.start, rows.stop) - (queries - 1)
        low, high = _run(positions, query, options.window)
        if call.kv is not None and call.kv.page_table is not None:
            low, high = 0, len(positions)  # a part of a page cannot be left out
        keys = slice(low, high)
        visible = visible_keys(query[:, None], positions[keys], causal=True, window=options.window)
        assert visible is not None
        yield _part(call, rows, keys, visible)


def _run(positions: Tensor, query: Tensor, window: int | None) -> tuple[int, int]:
    """The keys that any of the queries sees: from where to where."""
    if not len(query):
        return 0, 0
    high = int(torch.searchsorted(positions, query[-1], right=True))
    if window is None:
        return 0, high
    return min(high, int(torch.searchsorted(positions, query[0] - window, right=True))), high


def _part(call: AttentionCall, rows: slice, keys: slice, visible: Tensor) -> AttentionCall:
    options, kv = call.options, call.kv
    paged = kv is not None and kv.page_table is not None

    def own(tensor: Tensor) -> Tensor:
        return tensor if paged else tensor[:, :, keys]

    def here(extra: Tensor | None) -> Tensor | None:
        return None if extra is None else part_of(part_of(extra, 2, rows), 3, keys)

    mask = here(options.mask)
    if not bool(visible.all()):
        seen = visible.to(call.query.device)[None, None]
        mask = seen if mask is None else mask & seen
    if isinstance(kv, QuantKV) and not paged:
        kv = replace(
            kv,
            key=own(kv.key),
            key_scales=own(kv.key_scales),
            value=own(kv.value),
            value_scales=own(kv.value_scales),
        )
    tail, key_tail = call.query_tail, call.key_tail
    return replace(
        call,
        query=call.query[:, :, rows],
        query_tail=None if tail is None else tail[:, :, rows],
        key=own(call.key),
        value=own(call.value),
        key_tail=None if key_tail is None else own(key_tail),
        options=replace(
            options,
            key_positions=None,
            causal=False,
            window=None,
            mask=mask,
            bias=here(options.bias),
        ),
        kv=kv,
    )
