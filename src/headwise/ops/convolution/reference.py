"""The definition of a causal convolution of each channel by itself, with gradients."""

import torch
from torch import Tensor
from torch.nn import functional

from headwise.ops.convolution.call import ConvolutionCall


def run(call: ConvolutionCall) -> tuple[Tensor, Tensor]:
    """out [B,C,S] in the dtype of x, and the last inputs [B,C,N]."""
    x, (batch, channels, length) = call.x, call.x.shape
    width = call.weight.shape[1]
    before = max(call.kept, width - 1)
    state = call.state
    if state is None:
        state = x.new_zeros(batch, channels, before)
    inputs = torch.cat([state, x], dim=2)
    weight, seen = call.weight.to(call.exact), inputs.to(call.exact)
    out = seen.new_zeros(batch, channels, length)
    for j in range(width):
        first = before - width + 1 + j
        out = out + weight[:, j, None] * seen[:, :, first : first + length]
    if call.bias is not None:
        out = out + call.bias.to(call.exact)[:, None]
    if call.activation is not None:
        out = functional.silu(out)
    if call.lengths is None:
        after = inputs[:, :, inputs.shape[2] - call.kept :]
    else:
        past = torch.arange(length, device=x.device) >= call.lengths[:, None]
        out = out.masked_fill(past[:, None], 0.0)
        kept = torch.arange(before - call.kept, before, device=x.device)
        index = (kept + call.lengths[:, None])[:, None].expand(-1, channels, -1)
        after = inputs.gather(2, index.long())
    if call.in_place and call.state is not None:
        return out.to(x.dtype), call.state.copy_(after)
    return out.to(x.dtype), after.clone()
