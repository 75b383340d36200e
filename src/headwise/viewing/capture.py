"""Weights of a running model: chosen rows in full and all rows pooled, layer by layer as it runs.

Everything is computed from the queries, the keys and the log-sum-exp of the call that just ran. Of
its queries only the chosen rows' scores stay; the matrix of all weights never exists.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, UnsupportedError
from headwise.hf.observer import Seen
from headwise.viewing.layer import STATISTICS, LayerView
from headwise.viewing.pooling import Pool, row_counts, statistics, tile_size
from headwise.viewing.scored_call import ScoredCall


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
        matrices = {name: getattr(self.view, name) for name in ("raw", "added", "content")}
        cut: dict[str, Any] = {
            name: None if matrix is None else matrix[:, : len(rows), :tokens]
            for name, matrix in matrices.items()
        }
        view = replace(self.view, rows=rows, lse=self.view.lse[:, : len(rows)], **cut)
        if self.pool is not None:
            view.tiles_max, view.tiles_mean, view.statistics = self.pool.finished(tokens)
            return view
        positions = torch.tensor(rows, dtype=torch.int64)
        entropy = torch.special.entr(view.weights).sum(dim=-1)
        figures = statistics(view.weights, entropy, positions, causal=False).sum(dim=1)
        view.statistics = figures / row_counts(positions).clamp_min(1)
        return view


class Capture:
    """An observer (`headwise.hf.observer`) that keeps what `wanted` says of one model's run.

    `silent` maps a layer to heads whose output is replaced by zeros.
    """

    def __init__(
        self, model: nn.Module, wanted: Wanted, silent: dict[int, list[int]] | None = None
    ) -> None:
        self.wanted, self.silent = wanted, silent or {}
        self.modules = {id(module) for module in model.modules()}
        self.layers: dict[int, LayerRecord] = {}
        self.indices: dict[int, int] = {}

    def __call__(self, seen: Seen) -> Tensor:
        if id(seen.module) not in self.modules:
            return seen.out
        index = self._index(seen.module)
        chosen = self.wanted.layers is None or index in self.wanted.layers
        if chosen and self.wanted.tokens:
            with torch.no_grad():
                self._record(seen, index)
        return silenced(seen.out, self.silent.get(index, []), index)

    def views(self, tokens: int) -> list[LayerView]:
        """What was seen, by layer, cut to the `tokens` that there were in the end.

        Raises:
            UnsupportedError: nothing was seen.
            OptionError: none of the chosen layers was seen.
        """
        if not self.indices:
            raise UnsupportedError(
                "no attention of this model runs on headwise; see headwise.attach"
            )
        if not self.layers:
            known = sorted(self.indices.values())
            raise OptionError(f"no layer was chosen that runs on headwise; it has {known}")
        return [self.layers[index].finished(tokens) for index in sorted(self.layers)]

    def _index(self, module: Any) -> int:
        """The module's own index where it has one that is free, or else the next free one."""
        if id(module) not in self.indices:
            own, taken = getattr(module, "layer_idx", None), set(self.indices.values())
            index = own if isinstance(own, int) and own not in taken else len(taken)
            self.indices[id(module)] = index if index not in taken else max(taken) + 1
        return self.indices[id(module)]

    def _record(self, seen: Seen, index: int) -> None:
        if seen.query.shape[0] != 1:
            raise UnsupportedError(f"a view is of one sequence, and {seen.query.shape[0]} ran")
        if seen.columns is not None:
            raise UnsupportedError(
                "a window cache with sinks has dropped keys: attach with another cache to view"
            )
        layer, asked = self.layers.get(index), seen.query.shape[2]
        # more queries than all before, and no keys but theirs: the model reads the text anew, as
        # Phi-3 does where its short factors end
        anew = layer is not None and asked == seen.key.shape[2] > layer.done
        if layer is None or anew:
            layer = self.layers[index] = LayerRecord(seen, index, self.wanted)
        call = ScoredCall(seen, layer.done)
        layer.done += asked
        for group in call.groups(layer.view.heads):
            call.keep_rows(layer.view, group)
            if layer.pool is not None:
                call.pool_rows(layer.pool, group)


def silenced(out: Tensor, heads: Iterable[int], layer: int) -> Tensor:
    """`out` [B,S,H,V] with the output of some heads replaced by zeros.

    Raises:
        OptionError: a head that the layer does not have.
    """
    for head in heads:
        if head >= out.shape[2]:
            raise OptionError(f"layer {layer} has heads 0 to {out.shape[2] - 1}, not {head}")
        out = out.clone()
        out[:, :, head] = 0.0
    return out
