"""Weights of a running model: chosen rows in full and all rows pooled, layer by layer as it runs.

Everything is computed from the queries, the keys and the log-sum-exp of the call that just ran. Of
its queries only the chosen rows' scores stay; the matrix of all weights never exists.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, UnsupportedError
from headwise.hf.observer import Seen
from headwise.ops import score_rows
from headwise.viewing.layer import STATISTICS, LayerView
from headwise.viewing.pooling import BLOCK, Pool, blocks, statistics, tile_size


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


class _Layer:
    """One layer while the model runs; `done` tokens have asked so far."""

    def __init__(self, seen: Seen, index: int, wanted: Wanted) -> None:
        all_heads = seen.query.shape[1]
        heads = range(all_heads) if wanted.heads is None else wanted.heads
        self.heads = [head for head in heads if head < all_heads]
        if not self.heads:
            raise OptionError(f"layer {index} has heads 0 to {all_heads - 1}, none of those chosen")
        size = (len(self.heads), len(wanted.rows), wanted.tokens)
        options = seen.options
        self.index, self.all_heads = index, all_heads
        self.kv_heads, self.latent = seen.key.shape[1], seen.latent
        self.head_dim = seen.query.shape[3]
        self.causal, self.scale = bool(options.causal), float(options.scale)
        self.softcap, self.window = options.softcap, options.window
        self.raw = torch.full(size, math.nan)
        self.added: Tensor | None = None
        self.content = None if seen.content_dim is None else torch.full(size, math.nan)
        self.lse = torch.full(size[:2], -math.inf)
        self.tile = tile_size(wanted.tokens)
        self.pool: Pool | None = None
        if wanted.overview:
            # a mask may be what hides later keys, so only the operator's own rule counts as causal
            self.pool = Pool(size[0], wanted.tokens, self.tile, causal=self.causal)
        self.done = 0

    def view(self, wanted: Wanted, tokens: int) -> LayerView:
        rows = [row for row in wanted.rows if row < tokens]
        side = math.ceil(tokens / self.tile)
        pool, part = self.pool, (slice(None), slice(len(rows)), slice(tokens))
        if self.latent is not None:
            mechanism = "MLA"
        elif self.kv_heads == self.all_heads:
            mechanism = "MHA"
        else:
            mechanism = "MQA" if self.kv_heads == 1 else "GQA"
        if pool is not None:
            pool.tokens, pool.max = tokens, pool.max[:, :side, :side]
            pool.sum = pool.sum[:, :side, :side]
        found = LayerView(
            index=self.index,
            mechanism=mechanism,
            all_heads=self.all_heads,
            kv_heads=1 if self.latent is not None else self.kv_heads,
            head_dim=self.head_dim,
            latent=self.latent,
            causal=self.causal,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            heads=self.heads,
            rows=rows,
            raw=self.raw[part],
            added=None if self.added is None else self.added[part],
            content=None if self.content is None else self.content[part],
            lse=self.lse[part[:2]],
            tile=self.tile,
            tiles_max=None if pool is None else pool.max,
            tiles_mean=None if pool is None else pool.mean,
            statistics=torch.zeros(len(self.heads), len(STATISTICS)),
        )
        found.statistics = _of_rows(found) if pool is None else pool.means
        return found


class Capture:
    """An observer (`headwise.hf.observer`) that keeps what `wanted` says of one model's run.

    `silent` maps a layer to heads whose output is replaced by zeros.
    """

    def __init__(
        self, model: nn.Module, wanted: Wanted, silent: dict[int, list[int]] | None = None
    ) -> None:
        self.wanted, self.silent = wanted, silent or {}
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.layers: dict[int, _Layer] = {}
        self.indices: dict[int, int] = {}
        # how many queries each layer has had, whether it is kept or not
        self.asked: dict[int, int] = {}

    def __call__(self, seen: Seen) -> Tensor:
        if id(seen.module) not in self.modules:
            return seen.out
        index = self._index(seen.module)
        chosen = self.wanted.layers is None or index in self.wanted.layers
        if chosen and self.wanted.tokens:
            with torch.no_grad():
                self._look(seen, index)
        return silenced(seen.out, self.silent.get(index, []), index)

    def views(self, tokens: int) -> list[LayerView]:
        """What was seen, by layer, cut to the `tokens` that there were in the end.

        Raises:
            UnsupportedError: nothing was seen.
        """
        if not self.indices:
            raise UnsupportedError(
                "no attention of this model runs on headwise; see headwise.attach"
            )
        if not self.layers:
            known = sorted(self.indices.values())
            raise OptionError(f"no layer was chosen that runs on headwise; it has {known}")
        return [self.layers[index].view(self.wanted, tokens) for index in sorted(self.layers)]

    def _index(self, module: Any) -> int:
        if id(module) not in self.indices:
            own = getattr(module, "layer_idx", None)
            taken = set(self.indices.values())
            free = own if isinstance(own, int) and own not in taken else len(self.indices)
            if free in taken:
                free = max(taken) + 1
            self.indices[id(module)] = free
        return self.indices[id(module)]

    def _look(self, seen: Seen, index: int) -> None:
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
            layer = self.layers[index] = _Layer(seen, index, self.wanted)
        start, layer.done = layer.done, layer.done + asked
        call = _Call(seen, layer.heads, start)
        wanted = [at for at, row in enumerate(self.wanted.rows) if start <= row < layer.done]
        for group in call.groups:
            if wanted:
                call.keep_rows(layer, group, wanted, [self.wanted.rows[at] for at in wanted])
            if layer.pool is not None:
                call.pool(layer.pool, group)


@dataclass(frozen=True)
class _Group:
    """Chosen heads that read one kv head: their places among the chosen, and their indices."""

    kv_head: int
    places: slice
    heads: list[int]


class _Call:
    """One call's tensors, with positions: query s is token `start` + s, key l is `column` + l."""

    def __init__(self, seen: Seen, heads: list[int], start: int) -> None:
        self.seen, self.start = seen, start
        self.count, self.context = seen.query.shape[2], seen.key.shape[2]
        # the last query sits on the last key, of what a cache has kept
        self.column = start + self.count - self.context
        per_group = seen.query.shape[1] // seen.key.shape[1]
        self.groups: list[_Group] = []
        for place, head in enumerate(heads):
            kv_head = head // per_group
            last = self.groups[-1] if self.groups else None
            if last is not None and last.kv_head == kv_head:
                self.groups[-1] = _Group(
                    kv_head, slice(last.places.start, place + 1), [*last.heads, head]
                )
            else:
                self.groups.append(_Group(kv_head, slice(place, place + 1), [head]))
        exact = torch.float64 if seen.query.dtype == torch.float64 else torch.float32
        self.exact = exact
        self._kept: tuple[int, Tensor] | None = None

    def key(self, kv_head: int) -> Tensor:
        """[L,D] of one kv head, widened once for all its blocks."""
        if self._kept is None or self._kept[0] != kv_head:
            self._kept = (kv_head, self.seen.key[0, kv_head].to(self.exact))
        return self._kept[1]

    def scores(self, group: _Group, rows: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """Scores [g,b,c] of queries `rows` (in the call) against `keys`, and their lse [g,b]."""
        seen, options = self.seen, self.seen.options
        query = seen.query[0, group.heads][:, rows].to(self.exact)
        extra = {
            name: None
            if getattr(options, name) is None
            else _part(getattr(options, name), group, rows, keys)
            for name in ("bias", "mask")
        }
        score = score_rows(
            query,
            self.key(group.kv_head)[keys],
            rows + self.context - self.count - keys.start,
            scale=float(options.scale),
            causal=bool(options.causal),
            window=options.window,
            softcap=options.softcap,
            **extra,
        )
        if seen.lse is not None:
            return score, seen.lse[0, group.heads][:, rows].to(self.exact)
        assert keys.stop - keys.start == self.context or bool(options.causal)
        lse = score.logsumexp(dim=-1)
        sinks = options.sinks
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[group.heads].to(self.exact)[:, None])
        return score, lse

    def keep_rows(self, layer: _Layer, group: _Group, places: list[int], rows: list[int]) -> None:
        """Scores of chosen rows in full: q.k, what is added to it, and its content part."""
        query_rows = torch.tensor(rows, device=self.seen.query.device) - self.start
        keys = slice(0, self.context)
        score, lse = self.scores(group, query_rows, keys)
        query = self.seen.query[0, group.heads][:, query_rows].to(self.exact)
        key = self.key(group.kv_head)
        hidden = score.isneginf()
        raw = (query @ key.T).masked_fill(hidden, math.nan)
        at = (group.places, places, slice(self.column, self.column + self.context))
        _put(layer.raw, at, raw)
        layer.lse[group.places, places] = lse.float().cpu()
        content_dim = self.seen.content_dim
        if layer.content is not None and content_dim is not None:
            content = query[..., :content_dim] @ key[:, :content_dim].T
            _put(layer.content, at, content.masked_fill(hidden, math.nan))
        bias = self.seen.options.bias
        if bias is not None:
            if layer.added is None:
                layer.added = torch.zeros_like(layer.raw)
            added = _part(bias, group, query_rows, keys).expand_as(raw)
            _put(layer.added, at, added)

    def pool(self, pool: Pool, group: _Group) -> None:
        """All rows of the call in blocks of bounded size."""
        per_row = len(group.heads) * max(1, self.context)
        size = max(1, min(1024, BLOCK // per_row))
        causal, window = bool(self.seen.options.causal), self.seen.options.window
        device = self.seen.query.device
        for part in blocks(range(self.start, self.start + self.count), pool.tile, size):
            first, stop = 0, self.context
            if causal:
                stop = part.stop - self.column
            if window is not None:
                first = max(0, part.start - self.column - window + 1)
            rows = torch.arange(part.start, part.stop, device=device)
            score, lse = self.scores(group, rows - self.start, slice(first, stop))
            shift = lse.masked_fill(lse.isneginf(), 0.0)
            # log of the weights; finite, so that 0 times it is 0
            score.sub_(shift[..., None]).clamp_min_(-1e30)
            weights = score.exp()
            entropy = -torch.linalg.vecdot(weights, score)
            pool.add(weights, entropy, rows, self.column + first, group.places)


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


def _part(extra: Tensor, group: _Group, rows: Tensor, keys: slice) -> Tensor:
    """Of a bias or mask [1,1|H,1|S,1|L] what some rows and keys of a group get."""
    part = extra[0]
    if part.shape[0] > 1:
        part = part[group.heads]
    if part.shape[1] > 1:
        part = part[:, rows]
    return part[..., keys] if part.shape[2] > 1 else part


def _put(into: Tensor, at: tuple[slice, list[int], slice], values: Tensor) -> None:
    places, rows, columns = at
    for index, row in enumerate(rows):
        into[places, row, columns] = values[:, index].float().cpu()


def _of_rows(layer: LayerView) -> Tensor:
    """The figures of each head [h,5], from the chosen rows alone."""
    weights, rows = layer.weights, torch.tensor(layer.rows)
    if not layer.rows:
        return torch.zeros(len(layer.heads), len(STATISTICS))
    entropy = torch.special.entr(weights).sum(dim=-1)
    found = statistics(weights, entropy, rows, causal=False)
    counts = torch.full((len(STATISTICS),), float(len(rows)))
    counts[STATISTICS.index("previous")] -= float((rows == 0).sum())
    return found.sum(dim=1) / counts.clamp_min(1)
