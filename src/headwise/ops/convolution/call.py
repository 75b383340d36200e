"""One call of a causal convolution: its tensors, checked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import require_lengths, require_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (None, "silu", "swish")


@dataclass(slots=True, eq=False)
class ConvolutionCall:
    """x [B,C,S], weight [C,W], bias [C], the inputs before [B,C,N]; N of them are kept again.

    A state in place is changed where it is.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    state: Tensor | None
    lengths: Tensor | None
    kept: int
    in_place: bool = False

    @property
    def exact(self) -> torch.dtype:
        """What sums are made in."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def check(call: ConvolutionCall) -> None:
    """Raise `ShapeError` on the first thing that does not fit."""
    require_tensor("x", call.x, 3)
    require_tensor("weight", call.weight, 2)
    batch, channels, length = call.x.shape
    width = call.weight.shape[1]
    if call.activation not in ACTIVATIONS:
        raise ShapeError(f"activation is {call.activation!r:.60}, expected None or 'silu'")
    if call.x.dtype not in _DTYPES:
        raise ShapeError(f"x is {call.x.dtype}, expected float32, bfloat16, float16 or float64")
    if width == 0:
        raise ShapeError("weight has shape [C, 0], expected a width of 1 or more")
    shapes = {"weight": [channels, width], "bias": [channels]}
    for name, tensor in (("weight", call.weight), ("bias", call.bias), ("state", call.state)):
        if tensor is None:
            continue
        require_tensor(name, tensor, 3 if name == "state" else len(shapes[name]))
        if name != "state" and list(tensor.shape) != shapes[name]:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}, expected {shapes[name]} for x "
                f"{list(call.x.shape)}"
            )
        if tensor.dtype != call.x.dtype or tensor.device != call.x.device:
            raise ShapeError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {call.x.dtype} on "
                f"{call.x.device} as x"
            )
    state = call.state
    if state is not None and (list(state.shape[:2]) != [batch, channels] or call.kept < width - 1):
        raise ShapeError(
            f"state has shape {list(state.shape)}, expected [{batch}, {channels}, {width - 1} or "
            "more]: the last inputs"
        )
    if call.lengths is not None:
        require_lengths(call.lengths, batch, length, call.x.device, "lengths")
