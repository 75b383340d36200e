"""What memory a piece of work takes: at its peak, and kept by autograd for the backward pass."""

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

_Result = TypeVar("_Result")

_PROCESS = Path("/proc/self")


def peak_memory(work: Callable[[], _Result]) -> tuple[_Result, int | None]:
    """What `work` returns, and the bytes of resident memory that it took at its peak.

    None where the system does not let a process reset its peak (it is Linux that does). What the
    process had freed before but not given back is given back first, as far as its allocator can.
    What the system takes back of other memory meanwhile makes it less.

    >>> import torch
    >>> kept, peak = peak_memory(lambda: torch.ones(2**26))  # 256 MiB
    >>> peak is None or 2**27 < peak < 2**29
    True
    """
    _give_back()
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except OSError:
        return work(), None
    result = work()
    return result, max(0, _status("VmHWM") - before)


def kept_activations(layer: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of `run`: each storage once, the layer's weights excepted.

    >>> layer, x = nn.Linear(8, 8), torch.ones(4, 8)
    >>> kept_activations(layer, lambda: layer(x).exp())  # x, and what exp gave
    256
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # alive until the count, so that no storage is used twice
    assert out.requires_grad
    return sum(sizes.values())


def _status(name: str) -> int:
    """Bytes of one line of the process's status."""
    for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"no {name} in the process's status")


def _give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
