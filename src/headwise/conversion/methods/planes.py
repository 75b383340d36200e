"""Rotary planes as complex numbers.

RoPE turns dims (f, f + D/2) of every head together, by an angle that depends on the position and on
f alone: with x_f + i x_{f+D/2} as one complex number it is a product with exp(i t theta_f). So any
complex combination of the same plane of several heads commutes with it, which is what lets heads be
aligned and merged before the rotation. (A rotation within the plane is one with a modulus of 1.)
The real score is Re(sum_f conj(q_f) k_f).
"""

import torch
from torch import Tensor


def to_planes(weight: Tensor, heads: int) -> Tensor:
    """[heads*D, X] to complex [heads, D/2, X].

    >>> to_planes(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), heads=1)[0, :, 0]
    tensor([1.+3.j, 2.+4.j])
    """
    real, imaginary = weight.view(heads, 2, -1, weight.shape[-1]).unbind(1)
    return torch.complex(real, imaginary)


def from_planes(planes: Tensor) -> Tensor:
    """The reverse: complex [heads, D/2, X] to [heads*D, X].

    >>> weight = torch.randn(2 * 8, 3)
    >>> torch.equal(from_planes(to_planes(weight, heads=2)), weight)
    True
    """
    return torch.stack([planes.real, planes.imag], dim=1).flatten(0, 2)


def plane_moments(planes: Tensor, second: Tensor) -> Tensor:
    """E[k_i conj(k_j)] of every plane, [D/2, K, K], for keys planes [K, D/2, X] times x."""
    return torch.einsum("ify,jfy->fij", _moved(planes, second), planes.conj())


def plane_energy(planes: Tensor, second: Tensor) -> Tensor:
    """E|q_f|^2 of every plane of every head, [H, D/2]."""
    return (_moved(planes, second) * planes.conj()).real.sum(-1)


def _moved(planes: Tensor, second: Tensor) -> Tensor:
    """planes [K, D/2, X] times a real matrix [X, X], which takes half the work in reals."""
    return to_planes(from_planes(planes) @ second, len(planes))


def concentrate(moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the heads of each plane so that the energy is in few of them.

    The principal components of the keys, where head i counts `weight`[i, f] in plane f.

    Args:
        moments: from `plane_moments`, [D/2, K, K].
        weight: [K, D/2], above zero.

    Returns:
        energy [D/2, K], largest first; encode [D/2, K, K] and decode [D/2, K, K], complex:
        component m is sum_i encode[f, m, i] k_i, and k_i is sum_m decode[f, i, m] of them.
    """
    scale = weight.T  # [D/2, K]
    weighted = moments * scale[:, :, None] * scale[:, None, :]
    energy, vectors = torch.linalg.eigh(weighted.to(torch.complex128))
    energy, vectors = energy.flip(-1).to(weight.dtype), vectors.flip(-1).to(moments.dtype)
    encode = vectors.mH * scale[:, None, :]
    decode = vectors / scale[:, :, None]
    return energy.clamp(min=0), encode, decode
