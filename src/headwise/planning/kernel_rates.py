"""How long headwise's attention takes for a cached token here: measured on shapes of its own.

The time of a decode step is linear in the context: keys and values of a token are read once, and
each query head of their group multiplies them. What a token costs depends on how many heads there
are (few go one after the other against each key, many as products of matrices), a little on their
size, and hardly on anything else. So a few shapes, measured once, predict all others.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from headwise.base.progress import Progress, silent
from headwise.measure import Shape, Timing, interleaved
from headwise.measure.environment import last_level_cache
from headwise.measure.inputs import ASSUMED_CACHE, make_inputs
from headwise.spec import AttentionSpec
from headwise.spec.mechanism import with_mechanism

# Query heads per kv head, on both sides of where the kernels change from rows to tiles.
_GROUPS = (1, 2, 4, 7, 8, 16, 64)
_DIMS = (64, 128)
_LATENT_HEADS = (16, 128)
_SHORT, _LONG = 512, 8192
# Bytes of a long cache, so that it streams from memory for some milliseconds.
_CACHE_BYTES = 32 * 2**20
_ROUNDS = 21


@dataclass(frozen=True)
class KernelRates:
    """Seconds that each unit of `decode_work` takes in one dtype; 0 for what is not named."""

    seconds_each: Mapping[str, float]

    def seconds(self, spec: AttentionSpec, context: int) -> float:
        """Predicted time of one layer's attention in a decode step, on a cache of this length.

        >>> rates = KernelRates({"call": 1e-6, "element, group 1": 1e-9})
        >>> spec = AttentionSpec(heads=8, kv_heads=8, head_dim=64, value_dim=64)
        >>> round(rates.seconds(spec, 1000), 9)
        0.001025
        """
        work = decode_work(spec, context)
        return sum(amount * self.seconds_each.get(name, 0.0) for name, amount in work.items())

    @classmethod
    def fitted(cls, shapes: Sequence[Shape], seconds: Sequence[float]) -> "KernelRates":
        """The rates, none below 0, with the least relative errors for shapes that took so long."""
        work = [decode_work(shape.spec, shape.context) for shape in shapes]
        names, timed = list(dict.fromkeys(itertools.chain(*work))), list(zip(work, seconds))
        while True:
            shares = torch.tensor(
                [[each.get(name, 0.0) / time for name in names] for each, time in timed],
                dtype=torch.float64,
            )
            size = shares.amax(dim=0)  # so that all columns count alike in what is rounded
            rates = torch.linalg.lstsq(shares / size, torch.ones_like(shares[:, :1])).solution
            fit = dict(zip(names, (rates[:, 0] / size).tolist()))
            names = [name for name in names if fit[name] >= 0]
            if len(names) == len(fit):
                return cls(fit)


def decode_work(spec: AttentionSpec, context: int) -> dict[str, float]:
    """What a decode step does, in units that take a fixed time each.

    Of heads: the call, elements of keys and values, and rows of them; of latents: the call, the
    elements that are read of them (2 R + P per token), and those of the two projections that are
    folded in. What depends on the number of heads is shared out to the numbers that are measured.
    """
    tokens = spec.pairs(1, context)
    decoded = spec.decoded()
    elements = tokens * decoded.kv_heads * (decoded.head_dim + decoded.value_dim)
    if spec.mechanism == "MLA":
        folded = spec.heads * decoded.value_dim * (spec.nope_dim + spec.value_dim)
        work = {"latent call": 1.0, "folded element": float(folded)}
        for heads, share in _shares(spec.heads, _LATENT_HEADS):
            work[f"latent element, {heads} heads"] = share * elements
        return work
    work = {"call": 1.0}
    for group, share in _shares(spec.group_size, _GROUPS):
        work[f"element, group {group}"] = share * elements
        work[f"row, group {group}"] = share * tokens * spec.kv_heads
    return work


def _shares(size: int, known: Sequence[int]) -> Iterator[tuple[int, float]]:
    """The known sizes beside a size, and how much of it each stands for.

    On the line between two; above them in proportion, below as the first.

    >>> list(_shares(2, (1, 3))), list(_shares(6, (1, 3)))
    ([(1, 0.5), (3, 0.5)], [(3, 2.0)])
    """
    above = bisect_left(known, size)
    if above == 0:
        yield known[0], 1.0
    elif above == len(known):
        yield known[-1], size / known[-1]
    else:
        low, high = known[above - 1 : above + 1]
        share = (size - low) / (high - low)
        yield from ((low, 1 - share), (high, share))


def measure_rates(
    dtype: str, beside: Sequence[Shape] = (), progress: Progress = silent
) -> tuple[KernelRates, dict[Shape, Timing]]:
    """Measure the rates, and in turn with them the shapes that are given.

    Returns the rates and the times of the other shapes, all from the same rounds: a busy moment of
    the machine is in all of them.
    """
    own = _shapes(dtype)
    shapes = [*own, *beside]
    calls = itertools.count()
    # Between two layers' attention a model reads its weights, which leaves nothing in the caches.
    weights = torch.ones(2 * (last_level_cache() or ASSUMED_CACHE) // 4)

    def before(name: str) -> None:
        progress("timing attention", next(calls), len(shapes) * (_ROUNDS + 1))
        weights.sum()

    progress("preparing caches", 0, 0)
    with torch.inference_mode():
        runs = {str(index): _run(shape, dtype) for index, shape in enumerate(shapes)}
        timings = list(interleaved(runs, rounds=_ROUNDS, warmup=1, before=before).values())
    rates = KernelRates.fitted(own, [timing.median for timing in timings[: len(own)]])
    return rates, dict(zip(beside, timings[len(own) :]))


def _run(shape: Shape, dtype: str) -> Callable[[], object]:
    """headwise on two copies in turn: where a tensor lies in memory changes its time."""
    copies = itertools.cycle([make_inputs(shape, getattr(torch, dtype)) for _ in range(2)])
    return lambda: next(copies).attend()


def _shapes(dtype: str) -> list[Shape]:
    """One group short; all groups long, in both sizes; the latents short and long."""
    shapes = [Shape(spec=_heads(32, 8, 128), context=_SHORT)]
    for group, dim in itertools.product(_GROUPS, _DIMS):
        kv_heads = max(1, _CACHE_BYTES // (_LONG * 2 * dim * getattr(torch, dtype).itemsize))
        shapes.append(Shape(spec=_heads(group * kv_heads, kv_heads, dim), context=_LONG))
    for heads, context in itertools.product(_LATENT_HEADS, (_SHORT, _LONG)):
        # DeepSeek's: a latent of 512 and a rope key of 64
        latent = with_mechanism(_heads(heads, heads, 128), "mla")
        shapes.append(Shape(spec=latent, context=context))
    return shapes


def _heads(heads: int, kv_heads: int, dim: int) -> AttentionSpec:
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim)
