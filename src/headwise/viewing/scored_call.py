"""The scores of one call of the attention function, computed anew from its queries and keys."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from headwise.hf.observer import Seen
from headwise.ops import score_rows
from headwise.viewing.layer import LayerView
from headwise.viewing.pooling import BLOCK, Pool, blocks


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Chosen heads that read one kv head: their places among the chosen, and their indices.

    key [L,D]: the kv head's, widened once for all its blocks.
    """

    places: slice
    heads: list[int]
    key: Tensor

    def part(self, extra: Tensor | None, rows: Tensor, keys: slice) -> Tensor | None:
        """Of a bias or mask [1,1|H,1|S,1|L] what some rows and keys of these heads get."""
        if extra is None:
            return None
        part = extra[0]
        if part.shape[0] > 1:
            part = part[self.heads]
        if part.shape[1] > 1:
            part = part[:, rows]
        return part[..., keys] if part.shape[2] > 1 else part


class ScoredCall:
    """One call, with positions: query s is token `start` + s, key l is token `column` + l."""

    def __init__(self, seen: Seen, start: int) -> None:
        self.seen, self.start = seen, start
        self.count, self.context = seen.query.shape[2], seen.key.shape[2]
        # the last query sits on the last key, of what a cache has kept
        self.column = start + self.count - self.context
        self.causal = bool(seen.options.causal)
        self.exact = torch.float64 if seen.query.dtype == torch.float64 else torch.float32

    def groups(self, heads: list[int]) -> Iterator[HeadGroup]:
        """The chosen heads, by the kv head that they read."""
        per_group = self.seen.query.shape[1] // self.seen.key.shape[1]
        place = 0
        for kv_head, members in groupby(heads, lambda head: head // per_group):
            group = list(members)
            places = slice(place, place + len(group))
            yield HeadGroup(places, group, self.seen.key[0, kv_head].to(self.exact))
            place = places.stop

    def keep_rows(self, view: LayerView, group: HeadGroup) -> None:
        """Write those rows of the view that ask in this call: q.k, what is added, the content."""
        stop = self.start + self.count
        places = [place for place, row in enumerate(view.rows) if self.start <= row < stop]
        if not places:
            return
        positions = [view.rows[place] - self.start for place in places]
        rows = torch.tensor(positions, device=self.seen.query.device)
        keys = slice(0, self.context)
        score, lse = self._scores(group, rows, keys)
        query, hidden = self._query(group, rows), score.isneginf()
        cell = (group.places, places, slice(self.column, self.column + self.context))

        raw = (query @ group.key.T).masked_fill(hidden, math.nan)
        view.raw[cell] = raw.float().cpu()
        view.lse[group.places, places] = lse.float().cpu()
        dim = self.seen.content_dim
        if view.content is not None and dim is not None:
            content = query[..., :dim] @ group.key[:, :dim].T
            view.content[cell] = content.masked_fill(hidden, math.nan).float().cpu()
        bias = group.part(self.seen.options.bias, rows, keys)
        if bias is not None:
            if view.added is None:
                view.added = torch.zeros_like(view.raw)
            view.added[cell] = bias.expand_as(raw).float().cpu()

    def pool_rows(self, pool: Pool, group: HeadGroup) -> None:
        """Pool all rows of the call, in blocks of bounded size."""
        per_row = len(group.heads) * max(1, self.context)
        size = max(1, min(1024, BLOCK // per_row))
        window = self.seen.options.window
        for block in blocks(range(self.start, self.start + self.count), pool.tile, size):
            first = 0 if window is None else max(0, block.start - self.column - window + 1)
            stop = block.stop - self.column if self.causal else self.context
            rows = torch.arange(block.start, block.stop, device=self.seen.query.device)
            score, lse = self._scores(group, rows - self.start, slice(first, stop))
            shift = lse.masked_fill(lse.isneginf(), 0.0)
            # log of the weights; finite, so that 0 times it is 0
            score.sub_(shift[..., None]).clamp_min_(-1e30)
            weights = score.exp()
            entropy = -torch.linalg.vecdot(weights, score)
            pool.add(weights, entropy, rows, self.column + first, group.places)

    def _query(self, group: HeadGroup, rows: Tensor) -> Tensor:
        return self.seen.query[0, group.heads][:, rows].to(self.exact)

    def _scores(self, group: HeadGroup, rows: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """Scores [g,b,c] of queries `rows` (in the call) against `keys`, and their lse [g,b]."""
        seen, options = self.seen, self.seen.options
        score = score_rows(
            self._query(group, rows),
            group.key[keys],
            rows + self.context - self.count - keys.start,
            scale=float(options.scale),
            causal=self.causal,
            window=options.window,
            softcap=options.softcap,
            bias=group.part(options.bias, rows, keys),
            mask=group.part(options.mask, rows, keys),
        )
        if seen.lse is not None:
            return score, seen.lse[0, group.heads][:, rows].to(self.exact)
        assert keys.stop - keys.start == self.context or self.causal
        lse = score.logsumexp(dim=-1)
        sinks = options.sinks
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[group.heads].to(self.exact)[:, None])
        return score, lse
