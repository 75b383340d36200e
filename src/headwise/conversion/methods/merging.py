"""Fewer kv heads: GQA and MQA from MHA or GQA.

Naive: the mean of the heads of a group (Ainslie et al. 2023, arXiv 2305.13245, section 2.1).
Aligned: heads that resemble one another form a group. Each rotary plane keeps the one complex
combination of the group's keys that loses least of the scores on the calibration text; query heads
take up how their key was turned and scaled. Values keep the D dims that matter most for what the
output projection makes of them, and the way back is folded into that projection.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.methods.method import Method
from headwise.conversion.methods.planes import concentrate, from_planes, plane_moments, to_planes
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.statistics import LayerStatistics, Moments, Sensitivity, root

_SWEEPS = 8
# Groups of heads are changed for no smaller gain.
_LEAST_GAIN = 1e-9
Group = frozenset[int]


def merging(original: Checkpoint, kv_heads: int, layer_class: Any) -> Method:
    """Fewer kv heads, in the same architecture."""
    config = copy.deepcopy(original.config)
    config.num_key_value_heads = kv_heads

    def convert(
        index: int, layer: Projections, statistics: LayerStatistics | None
    ) -> dict[str, Tensor]:
        if statistics is None:
            return pooled(layer, kv_heads).tensors
        return aligned(layer, statistics.moments, kv_heads).tensors

    return Method(config, layer_class, convert)


def pooled(layer: Projections, kv_heads: int) -> Projections:
    """Each group of neighbouring heads becomes their mean."""
    key = layer.key.view(kv_heads, -1, layer.head_dim, layer.key.shape[1]).mean(1)
    value = layer.value.view(kv_heads, -1, layer.value_dim, layer.value.shape[1]).mean(1)
    return replace(layer, key=key.flatten(0, 1), value=value.flatten(0, 1), kv_heads=kv_heads)


def aligned(layer: Projections, moments: Moments, kv_heads: int) -> Projections:
    """Merge to `kv_heads` so that scores and outputs change least for inputs like these."""
    second, likely = moments.second, moments.general
    size = layer.kv_heads // kv_heads
    layer = layer.permuted([head for group in grouped(layer, second, size) for head in group])
    query, key = to_planes(layer.query, layer.heads), to_planes(layer.key, layer.kv_heads)
    key_weight, values, inverses = _weighted(layer, second)
    output = layer.output.view(len(layer.output), layer.heads, layer.value_dim)
    merged_queries, merged_keys, merged_values, merged_outputs = [], [], [], []
    for kv_head in range(kv_heads):
        group = slice(kv_head * size, (kv_head + 1) * size)
        served = slice(group.start * layer.group_size, group.stop * layer.group_size)
        _, encode, decode = concentrate(plane_moments(key[group], second), key_weight[group])
        merged_keys.append(torch.einsum("fi,ifx->fx", encode[:, 0], key[group])[None])
        # the score of a query with k_i = decode_i k* is that of conj(decode_i) q with k*
        turn = decode[:, :, 0].conj().T.repeat_interleave(layer.group_size, dim=0)
        merged_queries.append(query[served] * turn[:, :, None])
        value, back = _merged_values(values[group], inverses[group], likely)
        back = back.repeat_interleave(layer.group_size, dim=0)
        merged_values.append(value)
        merged_outputs.append(torch.einsum("ehv,hvw->ehw", output[:, served], back))
    return replace(
        layer,
        query=from_planes(torch.cat(merged_queries)),
        key=from_planes(torch.cat(merged_keys)),
        value=torch.cat(merged_values),
        output=torch.cat(merged_outputs, dim=1).flatten(1),
        kv_heads=kv_heads,
    )


def grouped(layer: Projections, second: Tensor, size: int) -> list[list[int]]:
    """Groups of `size` kv heads each, by what merging them loses: pairs are swapped while it helps.

    Of keys and of values each the share of the energy that no merged head can hold.
    """
    count = layer.kv_heads // size
    groups = [frozenset(range(first * size, (first + 1) * size)) for first in range(count)]
    key_weight, values, _ = _weighted(layer, second)
    weight, values = key_weight.T, values.flatten(0, 1)
    moments = plane_moments(to_planes(layer.key, layer.kv_heads), second)
    moments = moments * (weight[:, :, None] * weight[:, None, :])
    spread = values @ second @ values.T
    total_key = moments.diagonal(dim1=1, dim2=2).real.sum().clamp(min=1e-30)
    total_value = spread.trace().clamp(min=1e-30)
    spread = spread.view(layer.kv_heads, layer.value_dim, layer.kv_heads, layer.value_dim)

    @cache
    def loss(group: Group) -> float:
        heads = torch.tensor(sorted(group))
        key_loss = torch.linalg.eigvalsh(moments[:, heads][:, :, heads])[:, :-1].sum()
        block = spread[heads][:, :, heads].flatten(0, 1).flatten(1)
        value_loss = torch.linalg.eigvalsh(block)[: -layer.value_dim].sum()
        return float(key_loss / total_key + value_loss / total_value)

    def losses(some: Iterable[Group]) -> float:
        return sum(map(loss, some))

    for _ in range(_SWEEPS if 1 < size < layer.kv_heads else 0):
        before = losses(groups)
        for one, other in combinations(range(count), 2):
            pair = groups[one], groups[other]
            best = min(_swaps(*pair), key=losses)
            if losses(best) < losses(pair) - _LEAST_GAIN:
                groups[one], groups[other] = best
        if losses(groups) > before - _LEAST_GAIN:
            break
    return [sorted(group) for group in groups]


def _weighted(layer: Projections, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What keys count, [K, D/2]; the values in coordinates of errors, [K, V, E+1]; the way back."""
    even = Sensitivity.even(layer.heads)
    roots, inverses = root(even.value_moments(layer))
    values = roots @ layer.value.view(layer.kv_heads, layer.value_dim, -1)
    return even.key_weight(layer, second), values, inverses


def _swaps(one: Group, other: Group) -> Iterator[tuple[Group, Group]]:
    """The two groups after each swap of a head of one with a head of the other."""
    for a, b in product(sorted(one), sorted(other)):
        yield one - {a} | {b}, other - {b} | {a}


def _merged_values(values: Tensor, inverses: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """One value head for n weighted ones [n, V, E+1]: its projection [V, E+1], and the way back to
    each of them, [n, V, V].
    """
    count, dim, _ = values.shape
    rows = values.flatten(0, 1)
    vectors = torch.linalg.eigh((rows @ second @ rows.T).double())[1]
    directions = vectors[:, -dim:].float()
    return directions.T @ rows, inverses @ directions.view(count, dim, dim)
