"""One layer while the model runs: its chosen rows, written as they come, and all rows pooled."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.errors import OptionError
from headwise.hf.observer import Seen
from headwise.viewing.layer import STATISTICS, LayerView
from headwise.viewing.pooling import Pool, row_counts, statistics, tile_size


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to keep: of these layers and heads (None: all) the rows at these positions.

    overview: also pool all rows. tokens: how many there will be at most.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    overview: bool = True
    tokens: int


class LayerRecord:
    """A view of a layer that is filled call by call.

    Attributes:
        view: with room for all `wanted.rows` and `wanted.tokens`.
        pool: all rows; None where no overview is wanted.
        done: how many tokens have asked so far.

    Raises:
        OptionError: the layer has none of the wanted heads.
    """

    def __init__(self, seen: Seen, index: int, wanted: Wanted) -> None:
        all_heads, options = seen.query.shape[1], seen.options
        chosen = range(all_heads) if wanted.heads is None else wanted.heads
        heads = [head for head in chosen if head < all_heads]
        if not heads:
            raise OptionError(f"layer {index} has heads 0 to {all_heads - 1}, none of those chosen")
        size = (len(heads), len(wanted.rows), wanted.tokens)
        self.view = LayerView(
            index=index,
            all_heads=all_heads,
            kv_heads=seen.key.shape[1] if seen.latent is None else 1,
            head_dim=seen.query.shape[3],
            latent=seen.latent,
            causal=bool(options.causal),
            scale=float(options.scale),
            softcap=options.softcap,
            window=options.window,
            heads=heads,
            rows=list(wanted.rows),
            raw=torch.full(size, math.nan),
            content=None if seen.content_dim is None else torch.full(size, math.nan),
            lse=torch.full(size[:2], -math.inf),
            tile=tile_size(wanted.tokens),
            statistics=torch.zeros(len(heads), len(STATISTICS)),
        )
        # a mask may be what hides later keys, so only the operator's own rule counts as causal
        self.pool = Pool(self.view, wanted.tokens) if wanted.overview else None
        self.done = 0

    def finished(self, tokens: int) -> LayerView:
        """The view, cut to the `tokens` that there were in the end."""
        rows = [row for row in self.view.rows if row < tokens]

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, : len(rows), :tokens]

        view = replace(
            self.view,
            rows=rows,
            raw=self.view.raw[:, : len(rows), :tokens],
            added=cut(self.view.added),
            content=cut(self.view.content),
            lse=self.view.lse[:, : len(rows)],
        )
        if self.pool is not None:
            view.tiles_max, view.tiles_mean, view.statistics = self.pool.finished(tokens)
            return view
        positions = torch.tensor(rows, dtype=torch.int64)
        entropy = torch.special.entr(view.weights).sum(dim=-1)
        figures = statistics(view.weights, entropy, positions, causal=False).sum(dim=1)
        view.statistics = figures / row_counts(positions).clamp_min(1)
        return view
