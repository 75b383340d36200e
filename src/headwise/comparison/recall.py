"""Multi-query associative recall: pairs of a key and its value, and later each key alone.

At a key that stands alone the model has to say its value. Arora et al. 2023 (Zoology), arXiv
2312.04927: keys and values are drawn anew for each sequence and differ within it; at every second
place behind the pairs a key is asked, each once, and random tokens stand between. Here their order
is uniformly random, so that no place tells which value to say.
"""

import torch
from torch import Tensor

from headwise.comparison.configuration import Configuration
from headwise.comparison.task import IGNORED, Batch, Metric

_FIRST_PAIRS = 4
_HELD_OUT = 512
_HELD_OUT_SEED = 2**40


class RecallTask:
    """Sequences of 4 tokens for each of their pairs, in training first of few pairs.

    With all the pairs at once small models stay for long where they know the values of the
    sequence and not which one is asked; what they then learn from few pairs they soon do with more.
    So half of the steps have 4 pairs (the number halved until it is 4 or less), and the other half
    is split evenly into stages of twice as many, up to all. Each step has as many tokens.

    >>> task = RecallTask(Configuration(pairs=32, steps=120))
    >>> [task.pairs_at(step) for step in (0, 59, 60, 79, 80, 100, 119)]
    [4, 4, 8, 8, 16, 32, 32]
    """

    metric: Metric = "accuracy"

    def __init__(self, configuration: Configuration) -> None:
        self.vocabulary, self.pairs = configuration.vocabulary, configuration.pairs
        self.steps, self.tokens = configuration.steps, configuration.batch
        self.baseline = 1 / self.pairs
        self.stages = [self.pairs]
        while self.stages[0] > _FIRST_PAIRS:
            self.stages.insert(0, -(-self.stages[0] // 2))

    def pairs_at(self, step: int) -> int:
        """Pairs in a sequence of this step, from 0."""
        first, *others = self.stages
        after = 2 * step - self.steps
        if after < 0 or not others:
            return first
        return others[after * len(others) // self.steps]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """What step `step` trains on."""
        pairs = self.pairs_at(step)
        return sequences(self.tokens // (4 * pairs), pairs, self.vocabulary, generator)

    def held_out(self) -> list[Batch]:
        """512 sequences with all the pairs."""
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        return [
            sequences(64, self.pairs, self.vocabulary, generator) for _ in range(_HELD_OUT // 64)
        ]


def sequences(count: int, pairs: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """`count` sequences of 4 * `pairs` tokens: the pairs, then each key once at every second place.

    Keys are the first half of the vocabulary, values the second.

    >>> batch = sequences(2, 3, 20, torch.Generator().manual_seed(0))
    >>> batch.tokens.shape, (batch.targets != IGNORED).sum(dim=1)
    (torch.Size([2, 12]), tensor([3, 3]))
    """
    half = vocabulary // 2
    keys = different(count, half, pairs, generator)
    values = half + different(count, vocabulary - half, pairs, generator)
    tokens = torch.randint(vocabulary, (count, 4 * pairs), generator=generator)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    asked = 2 * pairs + 2 * different(count, pairs, pairs, generator)
    tokens.scatter_(1, asked, keys)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, asked, values)
    return Batch(tokens, targets)


def different(count: int, among: int, number: int, generator: torch.Generator) -> Tensor:
    """[count, number]: different integers below `among` in each row, in random order."""
    return torch.rand(count, among, generator=generator).topk(number, dim=1).indices
