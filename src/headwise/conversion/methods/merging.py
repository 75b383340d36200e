"""Fewer kv heads: GQA and MQA from MHA or GQA.

Naive: the mean of the heads of a group (Ainslie et al. 2023, arXiv 2305.13245, section 2.1).
Aligned: heads that resemble one another form a group. Each rotary plane keeps the one complex
combination of the group's keys that loses least of the scores on the calibration text; query heads
take up how their key was turned and scaled. Values keep the D dims that matter most for what the
output projection makes of them, and the way back is folded into that projection.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headwise.conversion.methods.planes import (
    concentrate,
    from_planes,
    plane_energy,
    plane_moments,
    to_planes,
)
from headwise.conversion.methods.projections import Moments, Projections
from headwise.conversion.methods.whitening import root, shrunk

_SWEEPS = 8


def pooled(layer: Projections, kv_heads: int) -> Projections:
    """Each group of neighbouring heads becomes their mean."""
    key = layer.key.view(kv_heads, -1, layer.head_dim, layer.key.shape[1]).mean(1)
    value = layer.value.view(kv_heads, -1, layer.value_dim, layer.value.shape[1]).mean(1)
    return replace(layer, key=key.flatten(0, 1), value=value.flatten(0, 1), kv_heads=kv_heads)


def aligned(layer: Projections, moments: Moments, kv_heads: int) -> Projections:
    """Merge to `kv_heads` so that scores and outputs change least for inputs like these."""
    second = moments.second
    likely = second - moments.centred + shrunk(moments.centred)
    size = layer.kv_heads // kv_heads
    order = [head for group in grouped(layer, second, size) for head in group]
    layer = layer.permuted(order)
    query, key = to_planes(layer.query, layer.heads), to_planes(layer.key, layer.kv_heads)
    weight = _query_weight(layer, query, second)
    queries, keys, values, outputs = [], [], [], []
    per_group = layer.heads // kv_heads
    output = layer.output.view(len(layer.output), layer.heads, layer.value_dim)
    roots, inverses = root(_value_moments(layer))
    whole = _weighted_values(layer, roots)
    for at in range(kv_heads):
        heads = slice(at * size, (at + 1) * size)
        _, encode, decode = concentrate(plane_moments(key[heads], second), weight[heads])
        keys.append(torch.einsum("fi,ifx->fx", encode[:, 0], key[heads])[None])
        # the score of a query with k_i = decode_i k* is that of conj(decode_i) q with k*
        turn = decode[:, :, 0].conj().T.repeat_interleave(layer.group_size, dim=0)
        served = slice(at * per_group, (at + 1) * per_group)
        queries.append(query[served] * turn[:, :, None])
        value, back = _merged_values(whole[heads], inverses[heads], likely)
        back = back.repeat_interleave(layer.group_size, dim=0)
        values.append(value)
        outputs.append(torch.einsum("ehv,hvw->ehw", output[:, served], back))
    return replace(
        layer,
        query=from_planes(torch.cat(queries)),
        key=from_planes(torch.cat(keys)),
        value=torch.cat(values),
        output=torch.cat(outputs, dim=1).flatten(1),
        kv_heads=kv_heads,
    )


def grouped(layer: Projections, second: Tensor, size: int) -> list[list[int]]:
    """Groups of `size` kv heads each, by what merging them loses: pairs are swapped while it helps.

    Of keys and of values each the share of the energy that no merged head can hold.
    """
    count = layer.kv_heads // size
    groups = [list(range(at * size, (at + 1) * size)) for at in range(count)]
    if count == 1 or size == 1:
        return groups
    key = to_planes(layer.key, layer.kv_heads)
    weight = _query_weight(layer, to_planes(layer.query, layer.heads), second)
    moments = plane_moments(key, second) * (weight.T[:, :, None] * weight.T[:, None, :])
    whole = _weighted_values(layer, root(_value_moments(layer))[0]).flatten(0, 1)
    spread = whole @ second @ whole.T
    spread = spread.view(layer.kv_heads, layer.value_dim, layer.kv_heads, layer.value_dim)
    total_key = moments.diagonal(dim1=1, dim2=2).real.sum().clamp(min=1e-30)
    total_value = spread.flatten(0, 1).flatten(1).trace().clamp(min=1e-30)
    known: dict[frozenset[int], float] = {}

    def loss(group: list[int]) -> float:
        name = frozenset(group)
        if name not in known:
            heads = torch.tensor(sorted(group))
            keys = torch.linalg.eigvalsh(moments[:, heads][:, :, heads])[:, :-1].sum()
            block = spread[heads][:, :, heads].flatten(0, 1).flatten(1)
            values = torch.linalg.eigvalsh(block)[: -layer.value_dim].sum()
            known[name] = float(keys / total_key + values / total_value)
        return known[name]

    for _ in range(_SWEEPS):
        before = sum(map(loss, groups))
        for one in range(count):
            for other in range(one + 1, count):
                _swap_best(groups, one, other, loss)
        if sum(map(loss, groups)) > before - 1e-9:
            break
    return [sorted(group) for group in groups]


def _swap_best(
    groups: list[list[int]], one: int, other: int, loss: Callable[[list[int]], float]
) -> None:
    """Swap the pair of heads between two groups that lowers the loss most, if any does."""
    best, found = loss(groups[one]) + loss(groups[other]), None
    for a in groups[one]:
        for b in groups[other]:
            first = [b if head == a else head for head in groups[one]]
            second = [a if head == b else head for head in groups[other]]
            now = loss(first) + loss(second)
            if now < best - 1e-9:
                best, found = now, (first, second)
    if found is not None:
        groups[one], groups[other] = found


def _query_weight(layer: Projections, query: Tensor, second: Tensor) -> Tensor:
    """[K, D/2]: the root of the energy of the queries that meet each plane of each kv head."""
    energy = plane_energy(query, second).view(layer.kv_heads, layer.group_size, -1).sum(1)
    return energy.clamp(min=max(float(energy.max()) * 1e-9, 1e-30)).sqrt()


def _weighted_values(layer: Projections, roots: Tensor) -> Tensor:
    """Values [K, V, E+1] in coordinates whose length is that of the output."""
    return roots @ layer.value.view(layer.kv_heads, layer.value_dim, -1)


def _value_moments(layer: Projections) -> Tensor:
    """[K, V, V]: what the output projection makes of each head's values, as a metric on them."""
    output = layer.output.view(-1, layer.kv_heads, layer.group_size, layer.value_dim)
    return torch.einsum("ekgv,ekgw->kvw", output, output)


def _merged_values(values: Tensor, inverses: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """One value head for n weighted ones [n, V, E+1]: its projection [V, E+1], and the way back to
    each of them, [n, V, V].
    """
    count, dim, _ = values.shape
    whole = values.flatten(0, 1)
    vectors = torch.linalg.eigh((whole @ second @ whole.T).double())[1]
    kept = vectors[:, -dim:].float()
    return kept.T @ whole, inverses @ kept.view(count, dim, dim)
