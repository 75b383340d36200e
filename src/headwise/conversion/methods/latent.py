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

from headwise.conversion.methods.planes import (
    concentrate,
    from_planes,
    plane_energy,
    plane_moments,
    to_planes,
)
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.sensitivity import Sensitivity
from headwise.conversion.methods.whitening import root, shrunk

# Errors of scores do more than `Sensitivity` says, which takes them for independent: so many times
# as much, by what measured best on SmolLM2.
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

    @property
    def rank(self) -> int:
        """R."""
        return self.up.shape[2]

    @property
    def rope_dim(self) -> int:
        """P."""
        return 2 * len(self.planes)


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


class Decomposition:
    """One layer's keys and values, ready to be cut to any P and R.

    Args:
        layer: the projections.
        second, centred: E[x x^T] and Cov(x) of the layer's inputs, [E+1, E+1].
        sensitivity: what errors of scores and values do to the output.
        frequencies: [D/2], radians a token.
        distances: how often each distance between query and key is met, [L], summing to 1.
        rotary_scale: what both cos and sin are multiplied with (YaRN); 1 mostly.
    """

    def __init__(
        self,
        layer: Projections,
        second: Tensor,
        centred: Tensor,
        sensitivity: Sensitivity,
        frequencies: Tensor,
        distances: Tensor,
        *,
        rotary_scale: float = 1.0,
    ) -> None:
        self.layer, self.rotary_scale = layer, rotary_scale
        self.centred = shrunk(centred)
        self.second = second - centred + self.centred
        groups = (layer.kv_heads, layer.group_size, -1)
        query = to_planes(layer.query, layer.heads)
        self.key = to_planes(layer.key, layer.kv_heads)
        energy = plane_energy(query, second) * sensitivity.score[:, None]
        energy = energy.view(groups).sum(1)
        self.weight = energy.clamp(min=max(float(energy.max()) * 1e-9, 1e-30)).sqrt()
        moments = plane_moments(self.key, second)
        held, self.encode, self.decode = concentrate(moments, self.weight)
        turn = torch.arange(len(distances))[:, None] * frequencies
        self.mean_turn = torch.polar(distances[:, None].expand_as(turn), -turn).sum(0)
        # of a score's variance, what is lost where the component goes without position
        lost = held * (1 - self.mean_turn.abs().square())[:, None] / 2
        self.order = lost.flatten().argsort(descending=True)
        score = _SCORES * _query_moments(layer, self.second, sensitivity)
        output = layer.output.view(-1, *groups[:2], layer.value_dim)
        weighted = sensitivity.value.view(groups[:2])
        self.key_root, self.key_inverse = map(_blocks, root(score))
        moment = torch.einsum("ekgv,ekgw,kg->kvw", output, output, weighted)
        self.value_root, self.value_inverse = map(_blocks, root(moment))

    def weights(self, rank: int, rope_dim: int) -> LatentWeights:
        """The layer with a latent of `rank` and a rotary key of `rope_dim`."""
        layer = self.layer
        rest = self._without_position(rope_dim)
        kept = self._directions(rest, rank)
        down = kept.T @ torch.cat([self.key_root @ rest, self.value_root @ layer.value])
        keys = len(rest)
        up_key = self.key_inverse @ kept[:keys] * self.rotary_scale**2
        up_value = self.value_inverse @ kept[keys:]
        heads = (layer.kv_heads, -1, rank)
        up = torch.cat([up_key.view(heads), up_value.view(heads)], dim=1)
        chosen = self.order[: rope_dim // 2]
        planes, component = chosen // layer.kv_heads, chosen % layer.kv_heads
        encode, decode = self.encode[planes, component], self.decode[planes, :, component]
        pairs = torch.einsum("pi,ipx->px", encode, self.key[:, planes])
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
        project = (self.decode * free[:, None]) @ self.encode * self.mean_turn[:, None, None]
        return from_planes(torch.einsum("fij,jfx->ifx", project, self.key))

    def _directions(self, rest: Tensor, rank: int) -> Tensor:
        """The principal `rank` directions of those keys together with the values, [.., R]."""
        key, value = self.key_root @ rest, self.value_root @ self.layer.value
        centred = self.centred @ key.T
        moment = torch.cat(
            [
                torch.cat([key @ centred, centred.T @ value.T], dim=1),
                torch.cat([value @ centred, value @ self.second @ value.T], dim=1),
            ]
        )
        vectors = torch.linalg.eigh(moment.double())[1]
        return vectors[:, -rank:].flip(-1).float()


class PlainDecomposition(Decomposition):
    """The naive cut, by the weights alone: every input, score and value counts alike.

    Keys that go without position are taken as they are.
    """

    def __init__(self, layer: Projections) -> None:
        size = layer.key.shape[1]
        even = torch.eye(size)
        even[-1, -1] = 0  # a bias is no direction
        one = torch.ones(1)
        frequencies = torch.zeros(layer.head_dim // 2)
        super().__init__(layer, even, even, Sensitivity.even(layer.heads), frequencies, one)
        self.weight = torch.ones_like(self.weight)
        held, self.encode, self.decode = concentrate(plane_moments(self.key, even), self.weight)
        self.order = held.flatten().argsort(descending=True)
        keys, values = layer.kv_heads * layer.head_dim, layer.kv_heads * layer.value_dim
        self.key_root = self.key_inverse = torch.eye(keys)
        self.value_root = self.value_inverse = torch.eye(values)


def _query_moments(layer: Projections, second: Tensor, sensitivity: Sensitivity) -> Tensor:
    """[K, D, D]: what the queries make of each kv head's keys, in units of the output's error."""
    query = layer.query.view(layer.heads, layer.head_dim, -1)
    moment = torch.einsum("hdx,xy,hcy->hdc", query, second, query)
    moment = moment * sensitivity.score[:, None, None]
    return moment.view(layer.kv_heads, layer.group_size, *moment.shape[1:]).sum(1)


def _blocks(matrices: Tensor) -> Tensor:
    """[K, n, n] to block diagonal [K*n, K*n]."""
    return torch.block_diag(*matrices)
