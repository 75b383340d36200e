"""How long headwise's attention takes for a cached token here: measured on shapes of its own.

The time of a decode step is linear in the context: keys and values of a token are read once, and
each query head of their group multiplies them. What a token costs depends on how many heads there
are (few go one after the other against each key, many as products of matrices), a little on their
size, and hardly on anything else. So a few shapes, measured once, predict all others.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headwise.base.progress import Progress, silent
from headwise.measure import Shape, Timing, interleaved
from headwise.measure.environment import last_level_cache
from headwise.measure.inputs import ASSUMED_CACHE, make_inputs
from headwise.spec import AttentionSpec

# Query heads on a kv head, on both sides of where the kernels change from rows to tiles.
_GROUPS = (1, 2, 4, 7, 8, 16, 64)
_DIMS = (64, 128)
_SHORT, _LONG = 512, 8192
# Bytes of a long cache, so that it streams from memory for some milliseconds.
_CACHE_BYTES = 32 * 2**20
_LATENT_HEADS = (16, 128)
_ROUNDS = 21


@dataclass(frozen=True)
class KernelRates:
    """Seconds of headwise's decode kernels in one dtype.

    Args:
        overhead: of a call, and of one on latents.
        groups: query heads on a kv head: (seconds an element of key and value, seconds a token).
        latent: heads: seconds an element that a token's latents are read for, 2 R + P.
        folding: seconds an element of the two projections that are folded in.
    """

    overhead: tuple[float, float]
    groups: dict[int, tuple[float, float]]
    latent: dict[int, float]
    folding: float

    def seconds(self, spec: AttentionSpec, context: int) -> float:
        """Predicted time of one layer's attention in a decode step, on a cache of this length.

        >>> rates = KernelRates((1e-6, 0.0), {1: (1e-9, 0.0), 8: (2e-9, 0.0)}, {}, 0.0)
        >>> spec = AttentionSpec(heads=8, kv_heads=8, head_dim=64, value_dim=64)
        >>> round(rates.seconds(spec, 1000), 9)
        0.001025
        """
        tokens = spec.pairs(1, context)
        if spec.latent_rank is not None and spec.rope_dim is not None:
            absorbed = spec.absorbed()
            elements = absorbed.head_dim + absorbed.value_dim
            token = elements * _between(self.latent, spec.heads)
            weights = spec.heads * spec.latent_rank * (spec.nope_dim + spec.value_dim)
            return self.overhead[1] + tokens * token + weights * self.folding
        element = _between({size: at[0] for size, at in self.groups.items()}, spec.group_size)
        token = _between({size: at[1] for size, at in self.groups.items()}, spec.group_size)
        dims = spec.head_dim + spec.value_dim
        return self.overhead[0] + tokens * spec.kv_heads * (dims * element + token)


def _between(known: dict[int, float], at: int) -> float:
    """A value between measured ones, on the line; above them in proportion, below as the first.

    >>> _between({1: 1.0, 3: 2.0}, 2), _between({1: 1.0, 3: 2.0}, 6)
    (1.5, 4.0)
    """
    sizes = sorted(known)
    if at <= sizes[0]:
        return known[sizes[0]]
    for low, high in itertools.pairwise(sizes):
        if at <= high:
            return known[low] + (at - low) / (high - low) * (known[high] - known[low])
    return known[sizes[-1]] * at / sizes[-1]


def measure_rates(
    dtype: str, beside: Sequence[Shape] = (), progress: Progress = silent
) -> tuple[KernelRates, dict[Shape, Timing]]:
    """Measure the rates, and in turn with them the shapes that are given.

    Returns the rates and the times of the other shapes, all from the same rounds: a busy moment of
    the machine is in all of them.
    """
    shapes = [*_shapes(dtype), *beside]
    total = len(shapes) * (_ROUNDS + 1)
    done = 0

    # Between two layers' attention a model reads its weights, which leaves nothing in the caches.
    weights = torch.ones(2 * (last_level_cache() or ASSUMED_CACHE) // 4)

    def before(name: str) -> None:
        nonlocal done
        progress("timing attention", done, total)
        weights.sum()
        done += 1

    progress("preparing caches", 0, 0)
    with torch.inference_mode():
        runs = {str(at): _run(shape, dtype) for at, shape in enumerate(shapes)}
        timings = interleaved(runs, rounds=_ROUNDS, warmup=1, before=before)
    found = [timings[str(at)] for at in range(len(shapes))]
    own = len(shapes) - len(beside)
    rates = _rates(shapes[:own], [timing.median for timing in found[:own]])
    return rates, dict(zip(beside, found[own:]))


def _run(shape: Shape, dtype: str) -> Callable[[], object]:
    """headwise on two copies in turn: where a tensor lies in memory changes its time."""
    copies = itertools.cycle([make_inputs(shape, getattr(torch, dtype)) for _ in range(2)])
    return lambda: next(copies).attend()


def _shapes(dtype: str) -> list[Shape]:
    """One group short; all groups long, in both sizes; the latents short and long."""
    size = getattr(torch, dtype).itemsize
    shapes = [Shape(spec=_heads(32, 8, 128), context=_SHORT)]
    for group, dim in itertools.product(_GROUPS, _DIMS):
        kv_heads = max(1, _CACHE_BYTES // (_LONG * 2 * dim * size))
        shapes.append(Shape(spec=_heads(group * kv_heads, kv_heads, dim), context=_LONG))
    shapes += [
        Shape(spec=_latent(heads), context=context)
        for heads, context in itertools.product(_LATENT_HEADS, (_SHORT, _LONG))
    ]
    return shapes


def _heads(heads: int, kv_heads: int, dim: int) -> AttentionSpec:
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim)


def _latent(heads: int) -> AttentionSpec:
    return AttentionSpec(
        heads=heads, kv_heads=heads, head_dim=192, value_dim=128, latent_rank=512, rope_dim=64
    )


def _rates(shapes: Sequence[Shape], seconds: Sequence[float]) -> KernelRates:
    """The rates that these times, of `_shapes` in their order, are made of."""
    short, *grouped = seconds[: -2 * len(_LATENT_HEADS)]
    few_short, few_long, many_short, many_long = seconds[-2 * len(_LATENT_HEADS) :]
    rows = [shape.context * shape.spec.kv_heads for shape in shapes]
    # the long shape of the group and dims that the short one has
    same = 1 + 2 * _GROUPS.index(4) + 1
    row = (seconds[same] - short) / (rows[same] - rows[0])
    overhead = max(0.0, short - rows[0] * row)
    groups = {}
    for at, group in enumerate(_GROUPS):
        small, large = (
            max(0.0, grouped[index] - overhead) / rows[1 + index] for index in (2 * at, 2 * at + 1)
        )
        element = max(0.0, (large - small) / (2 * (_DIMS[1] - _DIMS[0])))
        token = large - 2 * _DIMS[1] * element
        if token < 0:  # noise: all of it is then the elements'
            element, token = large / (2 * _DIMS[1]), 0.0
        groups[group] = (element, token)
    slopes = [
        (few_long - few_short) / (_LONG - _SHORT),
        (many_long - many_short) / (_LONG - _SHORT),
    ]
    few, many = few_short - _SHORT * slopes[0], many_short - _SHORT * slopes[1]
    head = max(0.0, (many - few) / (_LATENT_HEADS[1] - _LATENT_HEADS[0]))
    latent_overhead = max(0.0, few - _LATENT_HEADS[0] * head)
    spec = shapes[-1].spec
    assert spec.latent_rank is not None
    assert spec.rope_dim is not None
    elements = 2 * spec.latent_rank + spec.rope_dim
    return KernelRates(
        overhead=(overhead, latent_overhead),
        groups=groups,
        latent={heads: slope / elements for heads, slope in zip(_LATENT_HEADS, slopes)},
        folding=head / (spec.latent_rank * (spec.nope_dim + spec.value_dim)),
    )
