"""Other choices of the keys that a query reads: exact top-k, Quest, Double Sparsity.

Each chooses for all query heads of a kv head at once, as ours does: it estimates every head's
softmax weights, sums them over the group, and takes the largest. What differs is the estimate:

- Exact: of the keys themselves, in float32: the best choice of k keys by this measure, for which
  it reads all of them.
- Quest (arXiv 2406.10774): of pages, by the elementwise minimum and maximum of their keys, which
  bound a query's product with any key of the page from above. It reads whole pages.
- Double Sparsity (arXiv 2408.07092): of the channels that weigh most, in 4 bits. They are found
  beforehand, by the mean of |query x key| per channel.

Equal bytes. With D = 128 in bfloat16 a key and its value are 512 bytes. Ours reads of L tokens and
k chosen ones, per kv head, 80 L + 512 k bytes: a sketch of 4 bits for 128 channels and four float32
scales are 80. What a rival reads less of all tokens it may read more of chosen ones:

    bytes per token                                            keys at 8,192  16,384  32,768
    ours       128 x 4 bits, 4 x float32                   80          1,024   1,024   1,024
    Quest 8    2 rows of 256 bytes per page of 8 tokens    64          1,280   1,536   2,048
    Quest 16   the same, in pages of 16, as its paper has  32          1,792   2,560   4,096
    Double     64 channels x 4 bits, 2 x bfloat16          36          1,728   2,432   3,840

that is k + (80 - bytes) L / 512. Of 32, 64 and 96 channels in 4 bits, and 8 to 40 in bfloat16,
these 64 were nearest to dense on some of the questions. Exact has k = 1,024 as ours.

Query [B,H,S,D], key [B,K,L,D]; the last query stands at the last key. Choices are int32
[B,K,S,T], positions in ascending order, then -1; the first `sinks` and last `recent` keys are
always among them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

CHANNELS, LEVELS = 64, 15
SCALE_BYTES = 4  # of the smallest number and the step of a key's channels
SKETCH_BYTES = 80  # of ours, per token and kv head
ROW_BYTES = 512  # of a key and its value


def affordable(most: int, length: int, bytes_per_token: float) -> int:
    """The keys that may be read where all tokens cost that much, for the bytes that ours reads."""
    return most + int((SKETCH_BYTES - bytes_per_token) * length / ROW_BYTES)


def grouped(query: Tensor, heads: int) -> Tensor:
    """Query [B,H,S,D] as float32 [B,K,G,S,D]."""
    batch, _, count, dim = query.shape
    return query.float().view(batch, heads, -1, count, dim)


def products(query: Tensor, key: Tensor) -> Tensor:
    """[B,K,G,S,D] and [B,K,L,D]: [B,K,G,S,L], in float32."""
    return (query.flatten(2, 3) @ key.float().mT).unflatten(2, query.shape[2:4])


def summed(scores: Tensor, first: Tensor, length: int) -> Tensor:
    """Softmax weights summed over heads: [B,K,G,S,N] to [B,K,S,N], -1 where a query may not look.

    first: [N], the position of the first key of every column. The scores are written to.
    """
    hidden = first > positions(scores.shape[3], length)
    # what is hidden from some query is at the end
    some = slice(int((~hidden.any(0)).sum()), None)
    scores[..., some].masked_fill_(hidden[:, some], -torch.inf)
    scores -= scores.amax(-1, keepdim=True)
    powers = scores.exp_()
    weights = torch.einsum("bkgsn,bkgs->bksn", powers, 1 / powers.sum(-1))
    weights[..., some].masked_fill_(hidden[:, some], -1)
    return weights


def positions(count: int, length: int) -> Tensor:
    """[S,1], of the queries."""
    return torch.arange(length - count, length)[:, None]


def largest(weights: Tensor, always: Tensor, most: int) -> Tensor:
    """The columns with the largest weights [B,K,S,N]: ascending int32 [B,K,S,most], then -1."""
    columns = weights.shape[-1]
    weights = torch.where(always & (weights >= 0), torch.inf, weights)
    values, found = weights.topk(min(most, columns), sorted=False)
    found = found.masked_fill(values < 0, columns).sort().values
    found = found.masked_fill(found == columns, -1)
    return torch.nn.functional.pad(found, (0, most - found.shape[-1]), value=-1).int()


class Exact:
    """The keys with the largest weights. Holds a layer's keys in float32, as `Quest` its bounds."""

    def __init__(self) -> None:
        self.keys = torch.empty(0)
        self.length = 0

    def choose(
        self, query: Tensor, key: Tensor, scale: float, most: int, sinks: int, recent: int
    ) -> Tensor:
        kept = min(self.length, key.shape[2] - query.shape[2])
        if self.keys.numel() == 0 or key.shape[2] > self.keys.shape[2]:
            room = torch.empty(*key.shape[:2], key.shape[2] + 1024, key.shape[3])
            room[:, :, :kept] = self.keys[:, :, :kept] if kept else room[:, :, :0]
            self.keys = room
        self.keys[:, :, kept : key.shape[2]] = key[:, :, kept:]
        self.length = key.shape[2]
        known = self.keys[:, :, : self.length]
        scores = products(grouped(query, key.shape[1]) * scale, known)
        return self.best(scores, most, sinks, recent)

    @staticmethod
    def best(scores: Tensor, most: int, sinks: int, recent: int) -> Tensor:
        """By the scores [B,K,G,S,L] of all keys."""
        count, length = scores.shape[3:]
        column = torch.arange(length)
        always = (column < sinks) | (column > positions(count, length) - recent)
        return largest(summed(scores, column, length), always, most)


class Quest:
    """Whole pages, by bounds. Holds the bounds of one layer's pages.

    Every call has as many new keys as queries, so that what is known of older ones stays right when
    the cache was cropped since.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self.bounds = torch.empty(0)  # [2,B,K,pages,D]: minima and maxima
        self.length = 0

    def choose(
        self, query: Tensor, key: Tensor, scale: float, most: int, sinks: int, recent: int
    ) -> Tensor:
        count, length = query.shape[2], key.shape[2]
        low, high = self.known(key, count)
        heads = grouped(query, key.shape[1]) * scale
        scores = products(heads.clamp(min=0), high) + products(heads.clamp(max=0), low)
        first = self.page * torch.arange(low.shape[2])
        at = positions(count, length)
        always = (first < sinks) | (first + self.page > at - recent + 1)
        keys = affordable(most, length, 2 * low.shape[3] * key.element_size() / self.page)
        pages = largest(summed(scores, first, length), always, keys // self.page)
        found = pages[..., None] * self.page + torch.arange(self.page, dtype=torch.int32)
        found = found.masked_fill((pages[..., None] < 0) | (found > at[..., None]), length)
        found = found.flatten(-2).sort().values  # what is not there, behind the rest
        return found.masked_fill(found == length, -1)

    def known(self, key: Tensor, new: int) -> Tensor:
        """The bounds of all pages, [2,B,K,pages,D]."""
        whole = min(self.length, key.shape[2] - new) // self.page
        rest = key[:, :, whole * self.page :].split(self.page, dim=2)
        added = torch.stack([torch.stack([page.amin(2), page.amax(2)]) for page in rest], dim=3)
        self.bounds = torch.cat([self.bounds[:, :, :, :whole], added], dim=3) if whole else added
        self.length = key.shape[2]
        return self.bounds


def rounded(rows: Tensor) -> Tensor:
    """Rows as 4 bits have them: their smallest number, and steps from there."""
    low = rows.amin(-1, keepdim=True).bfloat16().float()
    step = ((rows.amax(-1, keepdim=True) - low) / LEVELS).clamp(min=1e-6).bfloat16().float()
    return ((rows - low) / step).round().clamp(0, LEVELS) * step + low


class DoubleSparsity:
    """Keys by some channels, in 4 bits. Holds these of one layer's keys, as `Quest` its bounds.

    While `learning` it finds the channels, per kv head, and chooses exactly.
    """

    def __init__(self) -> None:
        self.learning = True
        self.sizes = torch.empty(0)  # [B,K,D]: sums of |query| x |key| per channel
        self.channels = torch.empty(0)  # [B,K,1,CHANNELS]
        self.labels = torch.empty(0)  # [B,K,L,CHANNELS], numbers of LEVELS + 1 kinds per key
        self.length = 0

    def choose(
        self, query: Tensor, key: Tensor, scale: float, most: int, sinks: int, recent: int
    ) -> Tensor:
        if self.learning:
            self.learn(query, key)
            return Exact().choose(query, key, scale, most, sinks, recent)
        labels = self.known(key, query.shape[2])
        heads = grouped(query, key.shape[1]) * scale
        index = self.channels[:, :, None].expand(*heads.shape[:4], -1)
        keys = affordable(most, key.shape[2], CHANNELS / 2 + SCALE_BYTES)
        return Exact.best(products(heads.gather(4, index), labels), keys, sinks, recent)

    def learn(self, query: Tensor, key: Tensor) -> None:
        """The mean over pairs of |query x key| is the product of both means."""
        asked = grouped(query, key.shape[1]).abs().mean((2, 3))
        size = asked * key.float().abs().mean(2)
        self.sizes = self.sizes + size if self.sizes.numel() else size
        self.channels = self.sizes.topk(CHANNELS).indices[:, :, None]

    def known(self, key: Tensor, new: int) -> Tensor:
        """The channels of all keys, [B,K,L,CHANNELS]."""
        kept = min(self.length, key.shape[2] - new)
        rest = key[:, :, kept:]
        added = rounded(rest.gather(3, self.channels.expand(-1, -1, rest.shape[2], -1)).float())
        self.labels = torch.cat([self.labels[:, :, :kept], added], dim=2) if kept else added
        self.length = key.shape[2]
        return self.labels


RIVALS: dict[str, Callable[[], Exact | Quest | DoubleSparsity]] = {
    "exact": Exact,
    "quest8": partial(Quest, 8),
    "quest16": partial(Quest, 16),
    "double": DoubleSparsity,
}


class Layers:
    """A rival for every layer that chooses, which take turns: each forward asks all, in order."""

    def __init__(self, name: str, count: int) -> None:
        self.each = [RIVALS[name]() for _ in range(count)]
        self.calls = 0

    @property
    def learns(self) -> bool:
        """Whether something has to be read first, by which it learns."""
        return any(isinstance(each, DoubleSparsity) for each in self.each)

    def learned(self) -> None:
        """What was read until now is all that is learned from."""
        for each in self.each:
            if isinstance(each, DoubleSparsity):
                each.learning = False

    def choose(self, *given: Any) -> Tensor:
        """For the layer whose turn it is."""
        layer = self.each[self.calls % len(self.each)]
        self.calls += 1
        return layer.choose(*given)
