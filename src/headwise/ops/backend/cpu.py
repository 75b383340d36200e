"""The backend `cpu`: the C++ kernels of `csrc`, which read each key and value once per kv head.

Covers decoding, prefill and absorbed MLA with every option of the operator; not float64, not
gradients. The library is loaded at the first question about it.
"""

import torch
from torch import Tensor

from headwise.ops.attend.call import AttentionCall, Problem, contiguous_rows
from headwise.ops.backend import cpu_chosen, cpu_packed, cpu_state, cpu_step
from headwise.ops.backend.cpu_library import available, chosen_level, ready
from headwise.ops.backend.protocol import (
    Accepted,
    Backend,
    Offer,
    Rejected,
    Verdict,
)
from headwise.ops.modes import FEW_ROWS, forward_mode, needs_gradients
from headwise.ops.views import QuantKV

# What the operators in csrc/operators accept.
_MOST_DIM = 576
_MOST_KEYS = 2**31 - 1
_DENSE = Accepted("cpu", "C++, each key and value read once for all heads of a group")
_LATENT = Accepted("cpu", "C++, each latent read once for all heads")


def _accepts(problem: Problem) -> Verdict:
    obstacle = _obstacle(problem)
    if obstacle is not None:
        return Rejected("cpu", obstacle)
    verdict = _LATENT if problem.split_key else _DENSE
    if problem.chosen is not None:
        verdict = Accepted("cpu", f"{verdict.reason}, of the keys that are chosen")
    if problem.layout == "dense":
        return verdict
    return Accepted("cpu", f"{verdict.reason}, {problem.layout} in place")


def _obstacle(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`; None if they can."""
    if problem.device != "cpu":
        return f"runs on cpu, the tensors are on {problem.device}"
    if problem.needs_grad or problem.tangents:
        return "has no gradients"
    if problem.dtype not in cpu_step.DTYPES:
        return f"no kernel for {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > _MOST_DIM:
        return f"no kernel for head dims above {_MOST_DIM}"
    if problem.context > _MOST_KEYS:
        return f"no kernel for more than {_MOST_KEYS:,} keys"
    return ready() or None


def _attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    if call.options.chooses and not cpu_chosen.gathers(call):
        return cpu_chosen.attend_masked(call, _native)
    return _native(call)


def _native(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    kv, options = call.kv, call.options
    key, value, key_tail = call.key, call.value, call.key_tail
    page_table, context = None, 0
    scales: tuple[Tensor | None, ...] = (None, None, None)
    if kv is not None and kv.page_table is not None:
        page_table, context = contiguous_rows(kv.page_table), kv.context
    if isinstance(kv, QuantKV):
        key = kv.key
        first, second = contiguous_rows(kv.key_scales), contiguous_rows(kv.value_scales)
        scales = (first, second, None)
        if call.query_tail is not None:  # the latent is keys and values, the rope key beside it
            key_tail, scales = kv.value, (first, first, second)
    try:
        out, lse = torch.ops.headwise.attend.default(
            contiguous_rows(call.query),
            contiguous_rows(key),
            contiguous_rows(value),
            None if call.query_tail is None else contiguous_rows(call.query_tail),
            None if key_tail is None else contiguous_rows(key_tail),
            page_table,
            context,
            *scales,
            None if options.kv_lengths is None else options.kv_lengths.contiguous(),
            options.scale,
            options.return_lse,
            chosen_level(),
            *options.native(),
        )
    except RuntimeError:
        if kv is not None:  # pages that do not exist are found there
            kv.check_pages()
        raise
    return out, lse if options.return_lse else None


def _projects(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is faster than a matrix product of PyTorch's."""
    return (
        x.device.type == "cpu"
        and x.dtype in cpu_step.DTYPES
        and x.shape[0] * x.shape[2] <= FEW_ROWS
        and not needs_gradients(x, weight)
        and not forward_mode()
        and not ready()
    )


def project(x: Tensor, weight: Tensor, *, up: bool) -> Tensor:
    """A product of few rows with one matrix per head, which is read once.

    x [B,H,S,N] and weight [H,N,R] give [B,H,S,R] with `up`; x [B,H,S,R] and weight [H,V,R] give
    x weight^T [B,H,S,V] without.
    """
    result: Tensor = torch.ops.headwise.project.default(
        contiguous_rows(x), contiguous_rows(weight), up, chosen_level()
    )
    return result


def _quantizes(rows: Tensor, bits: int) -> bool:
    served = rows.device.type == "cpu" and rows.dtype in cpu_step.DTYPES
    return served and rows.shape[-1] <= _MOST_DIM and not ready()


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows [..., D]."""
    before, four = rows.shape[:-1], rows.detach()
    if rows.ndim != 4:
        four = four.reshape(1, 1, -1, rows.shape[-1])
    integers, scales = torch.ops.headwise.quantize.default(
        contiguous_rows(four), bits, chosen_level()
    )
    return integers.view(*before, integers.shape[-1]), scales.view(*before, scales.shape[-1])


def _reorders(first: Tensor, *rest: Tensor | int) -> bool:
    return first.device.type == "cpu" and not ready()


def reorder(first: Tensor, second: Tensor, index: Tensor, length: int) -> None:
    """Sequence i of two buffers [B,heads,capacity,dim] becomes what index[i] was."""
    torch.ops.headwise.reorder_.default(first, second, index.long().contiguous(), length)


BACKEND = Backend(
    "cpu",
    available,
    _accepts,
    _attend,
    **cpu_step.OFFERS,
    **cpu_packed.OFFERS,
    project=Offer(project, _projects),
    reorder=Offer(reorder, _reorders),
    quantize=Offer(quantize, _quantizes),
    index=cpu_chosen.INDEX,
    choose=cpu_chosen.CHOOSE,
    top_keys=cpu_chosen.TOP_KEYS,
    linear_attention=cpu_state.LINEAR_ATTENTION,
    causal_conv1d=cpu_state.CONVOLUTION,
)
