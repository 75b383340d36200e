"""Linear attention of few tokens in C++: a state is read once and written once."""

import torch
from torch import Tensor

from headwise.ops.attend.call import contiguous_rows
from headwise.ops.backend import cpu_library, cpu_step
from headwise.ops.backend.protocol import Offer
from headwise.ops.linear_attention.call import LinearCall
from headwise.ops.modes import forward_mode, needs_gradients

# What csrc/operators/linear_attention.cpp accepts.
_MOST_DIM = 4096
# Tokens up to which one after the other is faster than chunks of them.
_FEW = 16


def _serves(call: LinearCall) -> bool:
    query, given = call.query, (call.decay, call.beta, call.state)
    return (
        query.device.type == "cpu"
        and query.dtype in cpu_step.DTYPES
        and query.shape[2] <= _FEW
        and query.shape[3] <= _MOST_DIM
        and not needs_gradients(
            query, call.key, call.value, *(tensor for tensor in given if tensor is not None)
        )
        and not forward_mode()
        and not cpu_library.ready()
    )


def _run(call: LinearCall) -> tuple[Tensor, Tensor]:
    out, state = torch.ops.headwise.linear_attention.default(
        *map(contiguous_rows, (call.query, call.key, call.value)),
        call.decay_of(torch.float32),
        None if call.beta is None else call.beta.float(),
        call.scale,
        None if call.state is None else call.state.float().contiguous(),
        None if call.lengths is None else call.lengths.long().contiguous(),
        cpu_library.chosen_level(),
    )
    return out, state


LINEAR_ATTENTION = Offer(_run, _serves)
