"""MLA from MHA or GQA: one latent of rank R and one rotary key of P dims for all heads.

The kv heads of each rotary plane are rotated so that energy concentrates in few of them (the idea
of TransMLA, arXiv 2502.07864, with complex rotations). The P/2 components whose loss of position
would change the scores most keep their rotation; the others go without it, scaled by the mean of
the rotation over the distances met, and share the latent with the values. The latent is the
principal subspace of both, in coordinates in which lengths are errors of the layer's output on the
calibration text. Naive: the same cut of keys and values as they are, by the weights alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.conversion.methods.planes import concentrate, from_planes, plane_moments, to_planes
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.statistics import LayerStatistics, root

# `Sensitivity` takes errors of scores for independent, and they do more: this many times as much,
# by what measured best on SmolLM2.
_SCORES = 4.0


@dataclass(frozen=True)
class LatentWeights:
    """What an MLA layer is made of.

    Args:
        down: [R+P, E+1], the latent and then the rotary key, real parts before imaginary.
        up: [H, N+V, R], to the keys without position and the values.
        planes: [P/2], the rotary plane of each pair.
        mix: complex [H, P/2], what each query head's plane is multiplied with.
    """

    down: Tensor
    up: Tensor
    planes: Tensor
    mix: Tensor


def exact(layer: Projections) -> LatentWeights:
    """Everything kept: R = K*V holds the values, P = K*D all rotated keys; no key goes without."""
    heads, kv_heads, value_dim = layer.heads, layer.kv_heads, layer.value_dim
    key = to_planes(layer.key, kv_heads)
    planes = torch.arange(key.shape[1]).repeat(kv_heads)
    group = torch.arange(heads) // layer.group_size
    own = (group[:, None] == torch.arange(kv_heads)).repeat_interleave(key.shape[1], dim=1)
    pairs = key.flatten(0, 1)
    up = layer.value.new_zeros(heads, value_dim, kv_heads, value_dim)
    up[torch.arange(heads), :, group] = torch.eye(value_dim)
    return LatentWeights(
        down=torch.cat([layer.value, pairs.real, pairs.imag]),
        up=up.flatten(2),
        planes=planes,
        mix=own.to(torch.complex64),
    )


@dataclass(frozen=True)
class Decomposition:
    """One layer's keys and values, ready to be cut to any P and R.

    Args:
        layer: the projections.
        statistics: of the layer.
        encode, decode: [D/2, K, K], the heads of each plane to components and back; complex.
        order: [D/2 * K], the components, those first that keep their rotation longest.
        key_metric, value_metric: a root of what errors count in [K*D, K*D] and [K*V, K*V], and its
            inverse.
    """

    layer: Projections
    statistics: LayerStatistics
    encode: Tensor
    decode: Tensor
    order: Tensor
    key_metric: tuple[Tensor, Tensor]
    value_metric: tuple[Tensor, Tensor]

    def weights(self, rank: int, rope_dim: int) -> LatentWeights:
        """The layer with a latent of `rank` and a rotary key of `rope_dim`."""
        layer = self.layer
        (key_root, key_inverse), (value_root, value_inverse) = self.key_metric, self.value_metric
        key, value = key_root @ self._without_position(rope_dim), value_root @ layer.value
        directions = self._directions(key, value, rank)
        for_key, for_value = directions.split([len(key), len(value)])
        up_key = key_inverse @ for_key * self.statistics.rotary_scale**2
        heads = (layer.kv_heads, -1, rank)
        up = torch.cat([up_key.view(heads), (value_inverse @ for_value).view(heads)], dim=1)
        chosen = self.order[: rope_dim // 2]
        planes, component = chosen // layer.kv_heads, chosen % layer.kv_heads
        encode, decode = self.encode[planes, component], self.decode[planes, :, component]
        rotated = to_planes(layer.key, layer.kv_heads)[:, planes]
        pairs = torch.einsum("pi,ipx->px", encode, rotated)
        down = directions.T @ torch.cat([key, value])
        return LatentWeights(
            down=torch.cat([down, pairs.real, pairs.imag]),
            up=up.repeat_interleave(layer.group_size, dim=0),
            planes=planes,
            mix=decode.conj().T.repeat_interleave(layer.group_size, dim=0).contiguous(),
        )

    def _without_position(self, rope_dim: int) -> Tensor:
        """Keys less the components that stay rotated, [K*D, E+1]."""
        free = torch.ones(len(self.order), dtype=torch.bool)
        free[self.order[: rope_dim // 2]] = False
        free = free.view(-1, self.layer.kv_heads)
        project = (
            (self.decode * free[:, None]) @ self.encode * self.statistics.mean_turn[:, None, None]
        )
        key = to_planes(self.layer.key, self.layer.kv_heads)
        return from_planes(torch.einsum("fij,jfx->ifx", project, key))

    def _directions(self, key: Tensor, value: Tensor, rank: int) -> Tensor:
        """The principal `rank` directions of keys and values together, [K*D + K*V, R].

        Both are given in coordinates in which lengths are errors of the layer's output.
        """
        second, centred = self.statistics.moments.general, self.statistics.moments.general_centred
        centred = centred @ key.T
        moment = torch.cat(
            [
                torch.cat([key @ centred, centred.T @ value.T], dim=1),
                torch.cat([value @ centred, value @ second @ value.T], dim=1),
            ]
        )
        vectors = torch.linalg.eigh(moment.double())[1]
        return vectors[:, -rank:].flip(-1).float()


def aware(layer: Projections, statistics: LayerStatistics) -> Decomposition:
    """The decomposition by what the calibration text says."""
    moments, sensitivity = statistics.moments, statistics.sensitivity
    key_moments = plane_moments(to_planes(layer.key, layer.kv_heads), moments.second)
    key_weight = sensitivity.key_weight(layer, moments.second)
    energy, encode, decode = concentrate(key_moments, key_weight)
    # of a score's variance, what is lost where the component goes without position
    lost = energy * (1 - statistics.mean_turn.abs().square())[:, None] / 2
    order = lost.flatten().argsort(descending=True)
    key_metric = _metric(_SCORES * sensitivity.key_moments(layer, moments.general))
    value_metric = _metric(sensitivity.value_moments(layer))
    return Decomposition(layer, statistics, encode, decode, order, key_metric, value_metric)


def plain(layer: Projections) -> Decomposition:
    """The naive one, by the weights alone: every input, score and value counts alike.

    Keys that go without position are taken as they are.
    """
    statistics = LayerStatistics.even(layer)
    key = to_planes(layer.key, layer.kv_heads)
    key_moments = plane_moments(key, statistics.moments.second)
    energy, encode, decode = concentrate(key_moments, torch.ones(key.shape[:2]))
    order = energy.flatten().argsort(descending=True)
    keys, values = torch.eye(len(layer.key)), torch.eye(len(layer.value))
    return Decomposition(layer, statistics, encode, decode, order, (keys, keys), (values, values))


def _metric(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of moments [K, n, n] and their inverses, each block diagonal [K*n, K*n]."""
    half, inverse = root(moments)
    return torch.block_diag(*half), torch.block_diag(*inverse)
