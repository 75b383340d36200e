"""All rows of a call, block by block: pooled into tiles, and summed into figures of each head."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from headwise.viewing.layer import STATISTICS

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
    """Tiles and sums of h heads, to which blocks of weights are added as they come.

    sums [h,5] in the order of `STATISTICS`; counts [5], the rows in each.
    """

    def __init__(self, heads: int, tokens: int, tile: int, *, causal: bool) -> None:
        side = math.ceil(tokens / tile)
        self.causal = causal
        self.tokens, self.tile = tokens, tile
        self.max, self.sum = torch.zeros(heads, side, side), torch.zeros(heads, side, side)
        self.sums = torch.zeros(heads, len(STATISTICS), dtype=torch.float64)
        self.counts = torch.zeros(len(STATISTICS), dtype=torch.float64)

    def add(
        self, weights: Tensor, entropy: Tensor, rows: Tensor, column: int, heads: slice
    ) -> None:
        """weights [g,b,c] of `heads`, at positions `rows` [b] and from key `column` on.

        entropy [g,b], in nats. The rows stand one behind the other, in one row of tiles.
        """
        tile, side = self.tile, self.max.shape[-1]
        across = int(rows[0]) // tile
        start = column // tile
        before = column - start * tile
        after = -(before + weights.shape[2]) % tile
        padded = torch.nn.functional.pad(weights, (before, after)) if before or after else weights
        count = padded.shape[2] // tile
        assert start + count <= side
        assert int(rows[-1]) // tile == across
        by_tile = padded.view(*padded.shape[:2], count, tile)
        place = (heads, across, slice(start, start + count))
        highest = by_tile.amax(dim=(1, 3)).cpu()
        self.max[place] = torch.maximum(self.max[place], highest)
        by_column = padded.sum(dim=1)
        self.sum[place] += by_column.view(-1, count, tile).sum(dim=2).cpu()
        found = statistics(weights, entropy, rows, column, causal=self.causal)
        self.sums[heads] += found.sum(dim=1).double().cpu()
        if heads.start == 0:  # the same rows for all heads
            counted = torch.full((len(STATISTICS),), float(len(rows)))
            counted[STATISTICS.index("previous")] -= float((rows == 0).sum())
            self.counts += counted

    @property
    def means(self) -> Tensor:
        """The figures of each head, [h,5]: the mean over rows."""
        return (self.sums / self.counts.clamp_min(1)).float()

    @property
    def mean(self) -> Tensor:
        """The mean weight of each tile, [h,T,T], over all pairs in it; a hidden one counts as 0."""
        size = torch.full((self.max.shape[-1],), float(self.tile))
        size[-1] = self.tokens - self.tile * (len(size) - 1)
        return self.sum / (size[:, None] * size)


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


def _share(weights: Tensor, at: Tensor) -> Tensor:
    """The weight of one column in each row, [h,b]; 0 where there is no such column."""
    inside = (at >= 0) & (at < weights.shape[2])
    index = at.clamp(0, weights.shape[2] - 1).expand(*weights.shape[:2])
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
