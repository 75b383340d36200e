"""Rotary position embedding: pairs of elements turned by an angle that grows with the position.

Su et al. 2021, arXiv 2104.09864. Angles are computed in float32, as Transformers does, so that
checkpoints find the angles that they were trained with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, ShapeError
from headwise.ops import require_tensor


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: all angles are divided by `factor`. Chen et al., arXiv 2306.15595."""

    factor: float

    def __post_init__(self) -> None:
        _above("factor", self.factor)

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """The new frequencies, and what queries and keys are multiplied by."""
        return frequencies / self.factor, 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones stay, between them a ramp.

    A frequency is slow when it turns fewer than `low_freq_factor` times in `original_context`
    tokens, fast when more than `high_freq_factor` times.
    """

    factor: float
    original_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _above("factor", self.factor)
        _above("original_context", self.original_context)
        _above("high_freq_factor", self.high_freq_factor, self.low_freq_factor)

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """The new frequencies, and what queries and keys are multiplied by."""
        turns = self.original_context * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies, 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: a ramp over the dims, and warmer or colder scores. Peng et al. 2023, arXiv 2309.00071.

    Dims that turn more than `beta_fast` times in `original_context` tokens stay, those that turn
    fewer than `beta_slow` times are divided by `factor`. Queries and keys are multiplied by
    `attention_factor`: left out, 0.1 ln(factor) + 1, or with both mscales the quotient of theirs.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _above("factor", self.factor)
        _above("original_context", self.original_context)
        _above("beta_slow", self.beta_slow)
        _above("beta_fast", self.beta_fast)

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """The new frequencies, and what queries and keys are multiplied by."""
        dim = 2 * frequencies.shape[0]

        def where(turns: float) -> float:
            whole = self.original_context / (turns * 2 * math.pi)
            return dim * math.log(whole) / (2 * math.log(theta))

        low, high = where(self.beta_fast), where(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device) - low
        divided = (ramp / ((high - low) or 0.001)).clamp(0, 1)
        return divided * frequencies / self.factor + (1 - divided) * frequencies, self._warmth()

    def _warmth(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, strength: float) -> float:
        return 0.1 * strength * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


Scaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling
_SCALINGS = (LinearScaling, Llama3Scaling, YarnScaling)


def _above(name: str, value: float, least: float = 0.0) -> None:
    if not least < value < math.inf:
        raise OptionError(f"{name} is {value}, expected a finite number above {least:g}")


def check_positions(positions: Any, batch: int, length: int) -> None:
    """Raise `ShapeError` unless `positions` are integers of [S] or [B, S]."""
    if not isinstance(positions, Tensor):
        raise ShapeError(f"positions are a {type(positions).__name__}, expected a tensor")
    wide = positions.ndim == 2 and positions.shape[0] in (1, batch)
    if not (positions.ndim == 1 or wide) or positions.shape[-1] != length:
        raise ShapeError(
            f"positions have shape {list(positions.shape)}, expected [S] or [B, S] with "
            f"B={batch} and S={length}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"positions are {positions.dtype}, expected int32 or int64")


class Rope(nn.Module):
    """Turns queries and keys by their positions.

    Example:
        >>> import torch
        >>> from headwise.nn import Rope
        >>> rope = Rope(64, theta=500_000.0)
        >>> query = torch.randn(1, 8, 5, 64)  # [B, H, S, D]
        >>> rope(query, torch.arange(5)).shape
        torch.Size([1, 8, 5, 64])

    It has no weights, and keeps its frequencies in float32 whatever the model is converted to.

    Args:
        dim: elements of each head that are turned, an even number: the first ones where a head has
            more (partial rotary embedding).
        theta: base of the frequencies theta^(-2i / dim).
        scaling: how they are changed for longer contexts.
        interleaved: a pair is elements 2i and 2i + 1 (GPT-J, DeepSeek); else i and i + dim / 2
            (GPT-NeoX, Llama).

    Raises:
        OptionError: `dim` is odd or below 2, `theta` not above 1, or `scaling` none of those here.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        theta: float = 10_000.0,
        scaling: Scaling | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 2 or dim % 2:
            raise OptionError(f"dim is {dim!r}, expected an even number of at least 2")
        if not 1 < theta < math.inf:
            raise OptionError(f"theta is {theta}, expected a finite number above 1")
        if scaling is not None and not isinstance(scaling, _SCALINGS):
            kinds = ", ".join(kind.__name__ for kind in _SCALINGS)
            raise OptionError(f"scaling is a {type(scaling).__name__}, expected one of {kinds}")
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self.interleaved = interleaved
        frequencies, self.factor = self._compute()
        # a default device or meta holds for it as for the weights
        empty = torch.empty(dim // 2)
        filled = frequencies.to(empty.device) if empty.device.type != "meta" else empty
        self.register_buffer("frequencies", filled, persistent=False)

    def _compute(self) -> tuple[Tensor, float]:
        even = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (self.theta ** (even / self.dim))
        if self.scaling is None:
            return frequencies, 1.0
        return self.scaling.apply(frequencies, self.theta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        super()._apply(fn, recurse)
        device = self.frequencies.device
        if device.type != "meta":
            self.frequencies = self._compute()[0].to(device)
        return self

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, S, D] turned by positions [S] or [B, S], in x's dtype and on its device.

        Raises:
            ShapeError: D is below `dim`, or the positions are no integers that fit B and S.
        """
        require_tensor("x", x, 4)
        check_positions(positions, x.shape[0], x.shape[2])
        if x.shape[-1] < self.dim:
            raise ShapeError(f"x has a last dim of {x.shape[-1]}, expected at least {self.dim}")
        if self.frequencies.device != x.device:
            # shared by modules, it follows none of them from device to device
            self.frequencies = self._compute()[0].to(x.device)
        angles = positions[..., None].float() * self.frequencies
        if positions.ndim == 2:
            angles = angles[:, None]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        turned = x[..., : self.dim].to(torch.promote_types(x.dtype, torch.float32))
        sizes, dim = ((-1, 2), -1) if self.interleaved else ((2, -1), -2)
        left, right = turned.unflatten(-1, sizes).unbind(dim)
        pairs = torch.stack((left * cos - right * sin, right * cos + left * sin), dim)
        turned = pairs.flatten(-2).to(x.dtype)
        if x.shape[-1] == self.dim:
            return turned
        return torch.cat((turned, x[..., self.dim :]), dim=-1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        parts = [str(self.dim), f"theta={self.theta:g}"]
        if self.scaling is not None:
            parts.append(f"scaling={self.scaling}")
        return ", ".join(parts + ["interleaved"] * self.interleaved)
