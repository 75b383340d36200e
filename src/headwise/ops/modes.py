"""The modes of PyTorch under which a call has to be PyTorch's own: something else is watching."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Private names of PyTorch, in this file alone: a test holds them against the installed release.
_tracing = torch._C._get_tracing_state
_functions = torch._C._len_torch_function_stack
_dispatches = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active


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
