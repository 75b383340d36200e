"""All rows of a call, block by block: pooled into tiles, and summed into figures of each head."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from headwise.viewing.layer import STATISTICS, LayerView

# Scores of one block: 16 MiB in float32, whatever the context.
BLOCK = 2**22
# Tiles at a side, at most.
TILES = 64


def tile_size(tokens: int) -> int:
    """Tokens at the side of a tile, so that there are at most `TILES`.

    >>> tile_size(50), tile_size(64), tile_size(65), tile_size(32768)
    (1, 1, 2, 512)
    """
    return max(1, math.ceil(tokens / TILES))


class Pool:
    """All rows of a layer's chosen heads in tiles and sums, to which blocks are added as they come.

    sums [h,5] in the order of `STATISTICS`; counts [5], the rows in each.
    """

    def __init__(self, layer: LayerView, tokens: int) -> None:
        heads, side = len(layer.heads), math.ceil(tokens / layer.tile)
        self.causal, self.tile = layer.causal, layer.tile
        self.max, self.sum = torch.zeros(heads, side, side), torch.zeros(heads, side, side)
        self.sums = torch.zeros(heads, len(STATISTICS), dtype=torch.float64)
        self.counts = torch.zeros(len(STATISTICS), dtype=torch.float64)

    def add(
        self, weights: Tensor, entropy: Tensor, rows: Tensor, column: int, heads: slice
    ) -> None:
        """weights [g,b,c] of `heads`, at positions `rows` [b] and from key `column` on.

        entropy [g,b], in nats. The rows stand one behind the other, in one row of tiles.
        """
        tile = self.tile
        across, start = int(rows[0]) // tile, column // tile
        before = column - start * tile
        after = -(before + weights.shape[2]) % tile
        padded = torch.nn.functional.pad(weights, (before, after)) if before or after else weights
        by_tile = padded.unflatten(2, (-1, tile))
        assert int(rows[-1]) // tile == across
        place = (heads, across, slice(start, start + by_tile.shape[2]))
        self.max[place] = torch.maximum(self.max[place], by_tile.amax(dim=(1, 3)).cpu())
        self.sum[place] += by_tile.sum(dim=1).sum(dim=2).cpu()
        figures = statistics(weights, entropy, rows, column, causal=self.causal)
        self.sums[heads] += figures.sum(dim=1).double().cpu()
        if heads.start == 0:  # the same rows for all heads
            self.counts += row_counts(rows.cpu())

    def finished(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of `tokens` tokens: the largest and the mean weight of each tile, and the figures.

        The tiles are [h,T,T]; a mean is over all pairs in a tile, of which a hidden one counts as
        0. The figures of each head, [h,5], are means over rows.
        """
        side = math.ceil(tokens / self.tile)
        size = torch.full((side,), float(self.tile))
        size[-1] = tokens - self.tile * (side - 1)
        part = (slice(None), slice(side), slice(side))
        mean = self.sum[part] / (size[:, None] * size)
        return self.max[part], mean, (self.sums / self.counts.clamp_min(1)).float()


def row_counts(rows: Tensor) -> Tensor:
    """How many of the rows at these positions each figure is a mean of, [5].

    >>> row_counts(torch.tensor([0, 3, 4]))
    tensor([3., 3., 3., 2., 3.])
    """
    counts = torch.full((len(STATISTICS),), float(len(rows)))
    counts[STATISTICS.index("previous")] -= float((rows == 0).sum())
    return counts


def statistics(
    weights: Tensor, entropy: Tensor, rows: Tensor, column: int = 0, *, causal: bool
) -> Tensor:
    """The figures of each row, [h,b,5]: of weights [h,b,c] from key `column` on, entropy in nats.

    causal: keys behind a row's position have no weight.

    The first token has no previous one, and counts as 0 there.
    """
    columns = torch.arange(column, column + weights.shape[2], device=weights.device)
    if causal:
        total = weights.sum(dim=-1)
        distance = rows * total - weights @ columns.to(weights.dtype)
    else:
        apart = (rows[:, None] - columns).abs().to(weights.dtype)
        distance = torch.linalg.vecdot(weights, apart[None])
    shares = [
        _share(weights, torch.zeros_like(rows) - column),
        _share(weights, rows - 1 - column),
        _share(weights, rows - column),
    ]
    return torch.stack([entropy / math.log(2), distance, *shares], dim=-1)


def _share(weights: Tensor, columns: Tensor) -> Tensor:
    """The weight of one column in each row, [h,b]; 0 where there is no such column."""
    inside = (columns >= 0) & (columns < weights.shape[2])
    index = columns.clamp(0, weights.shape[2] - 1).expand(*weights.shape[:2])
    return weights.gather(2, index[..., None]).squeeze(-1) * inside


def blocks(rows: range, tile: int, rows_in_block: int) -> Iterator[range]:
    """The rows in parts of at most `rows_in_block`, none of which crosses a row of tiles.

    >>> [list(part) for part in blocks(range(3, 10), 4, 3)]
    [[3], [4, 5, 6], [7], [8, 9]]
    """
    start = rows.start
    while start < rows.stop:
        stop = min(start + rows_in_block, rows.stop, (start // tile + 1) * tile)
        yield range(start, stop)
        start = stop
