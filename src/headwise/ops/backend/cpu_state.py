"""Linear attention and its convolution in C++: a state is read once and written once."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # autograd does not see what an operator writes

from headwise.ops.attend.call import contiguous_rows
from headwise.ops.backend import cpu_library, cpu_step
from headwise.ops.backend.protocol import Offer
from headwise.ops.convolution.call import ConvolutionCall
from headwise.ops.linear_attention.call import LinearCall
from headwise.ops.modes import forward_mode, needs_gradients

# What csrc/operators accept.
_MOST_DIM, _MOST_WIDTH = 4096, 64


def _runs(first: Tensor, *others: Tensor | None) -> bool:
    tensors = [tensor for tensor in others if tensor is not None]
    return (
        first.device.type == "cpu"
        and first.dtype in cpu_step.DTYPES
        and not needs_gradients(first, *tensors)
        and not forward_mode()
        and not cpu_library.ready()
    )


def _serves(call: LinearCall) -> bool:
    others = (call.key, call.value, call.decay, call.beta, call.state)
    return call.query.shape[3] <= _MOST_DIM and _runs(call.query, *others)


def _run(call: LinearCall) -> tuple[Tensor, Tensor]:
    given = call.state
    state = None if given is None else given.float().contiguous()
    decay = None if call.decay is None else call.decay.float()
    if decay is not None and decay.ndim == 1:
        decay = decay.view(1, -1, 1).expand(call.value.shape[:3])
    arguments = (
        *map(contiguous_rows, (call.query, call.key, call.value)),
        decay,
        None if call.beta is None else call.beta.float(),
        call.scale,
        state,
        None if call.lengths is None else call.lengths.long().contiguous(),
        -1.0 if call.norm is None else call.norm,
        call.transposed,
        cpu_library.chosen_level(),
    )
    if given is None or state is None or not call.in_place:
        out, after = torch.ops.headwise.linear_attention.default(*arguments)
        return out, after
    out = torch.ops.headwise.linear_attention_.default(*arguments)
    increment_version(state)
    return out, state if state is given else given.copy_(state)


def _convolves(call: ConvolutionCall) -> bool:
    given = (call.weight, call.bias, call.state)
    return call.weight.shape[1] <= _MOST_WIDTH and _runs(call.x, *given)


def _convolve(call: ConvolutionCall) -> tuple[Tensor, Tensor]:
    weight, silu = call.weight.contiguous(), call.activation is not None
    bias = None if call.bias is None else call.bias.contiguous()
    lengths = None if call.lengths is None else call.lengths.long().contiguous()
    level = cpu_library.chosen_level()
    if call.in_place and call.state is not None and call.state.is_contiguous():
        out = torch.ops.headwise.causal_conv1d_.default(
            call.x, weight, bias, call.state, lengths, silu, level
        )
        increment_version(call.state)
        return out, call.state
    state = None if call.state is None else call.state.contiguous()
    out, after = torch.ops.headwise.causal_conv1d.default(
        call.x, weight, bias, state, lengths, call.kept, silu, level
    )
    if call.in_place and call.state is not None:
        after = call.state.copy_(after)
    return out, after


LINEAR_ATTENTION = Offer(_run, _serves)
CONVOLUTION = Offer(_convolve, _convolves)
