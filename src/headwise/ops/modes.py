"""The modes of PyTorch under which a call has to be PyTorch's own: something else is watching."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from headwise.ops.packed.formats import weight_sizes

# Private names of PyTorch, in this file alone: a test holds them against the installed release.
_tracing = torch._C._get_tracing_state
_functions = torch._C._len_torch_function_stack
_dispatches = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_backward = torch._C._current_graph_task_id


def forward_mode() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, forward_ad), which kernels would drop."""
    return forward_ad._current_level >= 0


def watched() -> bool:
    """Whether the running call is compiled, traced, transformed, cast or seen by a mode."""
    return bool(
        torch.compiler.is_compiling()
        or _tracing() is not None
        or torch.is_autocast_enabled("cpu")
        or _functions()
        or _dispatches()
        or _transforms()
        or forward_mode()
    )


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether what is made of these tensors is differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def in_backward() -> bool:
    """Whether a backward pass is running, as where checkpointing computes a part again."""
    return bool(_backward() != -1)


# Rows of x up to which a product takes what reading its weight takes.
FEW_ROWS = 16


def are_few(x: Tensor, most: int = FEW_ROWS) -> bool:
    """Whether x [...,E] has at least one row and at most `most`."""
    return x.ndim > 0 and 0 < x.numel() <= most * x.shape[-1]


def are_plain(
    x: Tensor, tensors: Sequence[Tensor], asked: Callable[[Tensor], bool] = lambda x: True
) -> bool:
    """Whether these are PyTorch's own strided tensors on the CPU, of one dtype, in a plain call.

    asked: what else is asked of x, before the others are looked at.
    """
    return (
        type(x) is Tensor
        and not watched()  # first: in a trace sizes are tensors
        and asked(x)
        and x.is_cpu
        and not x._is_zerotensor()
        and x.layout is torch.strided
        and not x.is_nested
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype is x.dtype
            and tensor.is_cpu
            and tensor.layout is torch.strided
            for tensor in tensors
        )
        and not needs_gradients(x, *tensors)
    )


def fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether x [...,E], a weight [F,E] and a bias [F] are of such sizes; else PyTorch may raise.

    The weight may be packed. The bias lies in one piece.
    """
    sizes = weight_sizes(weight)
    return (
        len(sizes) == 2
        and sizes[1] == x.shape[-1]
        and (bias is None or (bias.shape == sizes[:1] and bias.is_contiguous()))
    )
