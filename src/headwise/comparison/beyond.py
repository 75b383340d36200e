"""Recall over a distance: the pairs come first, and what is asked lies far outside of a window.

A sequence of `length` tokens begins with its pairs of a key and a value, a few at a time, each few
twice: at the second time the values are asked, near. It ends with the questions: each key once, in
random order, at every second place. Between them stand values that were drawn at random, so that
no key stands there with another value. What is judged is the questions at the end alone. A window
of an eighth of the length, as mechanisms have it by default, sees no pair from there, nor do five
layers of it; attention to all tokens does, and so does a memory of past segments.
"""

import torch

from headwise.comparison.configuration import Configuration
from headwise.comparison.recall import different
from headwise.comparison.task import IGNORED, Batch, Metric

# Of the longest sequence: the tokens of pairs that are shown twice together.
_NEAR = 8
_HELD_OUT = 512
_HELD_OUT_SEED = 2**41


class BeyondTask:
    """Sequences whose questions are far from the pairs, in training first near alone.

    What is far reaches a memory without gradients, so how a key is written is learnt from what is
    near: half of the steps have a few pairs twice and nothing else, and the other half is split
    evenly into stages of twice as many tokens, up to all.

    >>> task = BeyondTask(Configuration(task="beyond", steps=120))
    >>> [task.sizes_at(step) for step in (0, 59, 60, 80, 100, 119)]
    [(4, 16), (4, 16), (4, 32), (4, 64), (8, 128), (8, 128)]
    """

    metric: Metric = "accuracy"

    def __init__(self, configuration: Configuration) -> None:
        self.vocabulary, self.pairs = configuration.vocabulary, configuration.pairs
        self.length, self.steps = configuration.length, configuration.steps
        self.tokens, self.baseline = configuration.batch, 1 / self.pairs
        self.few = min(self.pairs, max(1, self.length // (4 * _NEAR)))
        self.stages = [(self.few, 4 * self.few)]
        while self.stages[-1][1] < self.length:
            tokens = min(self.length, 2 * self.stages[-1][1])
            self.stages.append((max(self.few, self.pairs * tokens // self.length), tokens))

    def sizes_at(self, step: int) -> tuple[int, int]:
        """Pairs and tokens of a sequence of this step, from 0."""
        first, *others = self.stages
        after = 2 * step - self.steps
        if after < 0:
            return first
        return others[after * len(others) // self.steps]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """What step `step` trains on."""
        pairs, tokens = self.sizes_at(step)
        return self.sequences(self.tokens // tokens, pairs, tokens, generator)

    def held_out(self) -> list[Batch]:
        """512 sequences of all the pairs and tokens, asked at the end alone."""
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        batches = []
        for _ in range(_HELD_OUT // 64):
            batch = self.sequences(64, self.pairs, self.length, generator)
            batch.targets[:, : -2 * self.pairs] = IGNORED
            batches.append(batch)
        return batches

    def sequences(self, count: int, pairs: int, length: int, generator: torch.Generator) -> Batch:
        """`count` sequences: pairs, `few` at a time and twice; values; and the questions.

        The last two are there where the length has room for questions.
        """
        half = self.vocabulary // 2
        keys = different(count, half, pairs, generator)
        values = half + different(count, self.vocabulary - half, pairs, generator)
        tokens = torch.randint(half, self.vocabulary, (count, length), generator=generator)
        targets = torch.full_like(tokens, IGNORED)
        at = 0
        for key, value in zip(keys.split(self.few, 1), values.split(self.few, 1), strict=True):
            number = key.shape[1]
            order = different(count, number, number, generator)
            first = torch.stack([key, value], dim=-1).flatten(1)
            again = torch.stack([key.gather(1, order), value.gather(1, order)], dim=-1).flatten(1)
            tokens[:, at : at + 4 * number] = torch.cat([first, again], dim=1)
            at += 4 * number
            targets[:, at - 2 * number : at : 2] = again[:, 1::2]
        if at + 2 * pairs <= length:
            asked = length - 2 * pairs + 2 * different(count, pairs, pairs, generator)
            tokens.scatter_(1, asked, keys)
            targets.scatter_(1, asked, values)
        return Batch(tokens, targets)
