"""Whether somebody else holds a buffer of a cache: the one place that asks PyTorch for its counts.

Transformers' caches concatenate, so what was taken from them never changes. Ours write in place,
which is the same for whoever looks only while nobody holds the rows that a write would reach.
"""

import sys
from functools import cache

import torch
from torch import Tensor

# Private names of PyTorch, all of which the tests look up.
_storage_use_count = getattr(torch._C, "_storage_Use_Count", None)
_HANDLE = "_cdata"


def others_hold(tensor: Tensor, own: int = 1) -> bool:
    """Whether anything but `tensor` itself looks at its memory: views, arrays, a graph's operands.

    Where that cannot be told, yes: then the caller copies, which is right and slower. own: tensors
    over that memory which are the caller's, this one among them.

    >>> buffer = torch.empty(2, 3)
    >>> others_hold(buffer)
    False
    >>> row = buffer[0]
    >>> others_hold(buffer)
    True
    """
    if torch.compiler.is_compiling():
        return True  # a graph has to be right whoever holds what when it runs
    if tensor.device.type == "meta":
        return False  # no memory
    if _storage_use_count is None or type(tensor) is not Tensor:
        return True  # a subclass may keep its rows elsewhere
    (held, handles), (alone, handles_alone) = _counts(tensor), _counts_alone()
    return (held - own, handles) != (alone - 1, handles_alone)


def alias(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory, of which `others_hold` knows."""
    return tensor.detach()


def _counts(tensor: Tensor) -> tuple[int, int]:
    """How many hold the storage, and how many its Python object, which is one of those."""
    assert _storage_use_count is not None
    storage = tensor.untyped_storage()
    return _storage_use_count(getattr(storage, _HANDLE)), sys.getrefcount(storage)


@cache
def _counts_alone() -> tuple[int, int]:
    """What `_counts` says of a tensor that nobody else holds; it depends on the versions."""
    return _counts(torch.empty(1, device="cpu"))
