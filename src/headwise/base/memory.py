"""What fits in memory, and sizes for people."""

import psutil
import torch

from headwise.errors import CapacityError

_ADVICE = "use a smaller model, --dtype bfloat16 or a shorter context"


def check_memory(needed: int, device: torch.device, what: str, advice: str = _ADVICE) -> None:
    """Refuse what would not fit in the device's free memory; `needed` in bytes.

    Raises:
        CapacityError: says the needed and the available bytes.
    """
    available = available_bytes(device)
    if needed > available:
        raise CapacityError(
            f"{what} needs {gib(needed)} but {gib(available)} of memory is available on {device}; "
            f"{advice}"
        )


def available_bytes(device: torch.device) -> int:
    """Bytes that are free on a device: the driver's count for CUDA, the system's else."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def gib(count: int) -> str:
    """A byte count for people.

    >>> gib(3 * 2**30 // 2), gib(538_090_408), gib(92_160), gib(640)
    ('1.50 GiB', '513 MiB', '90 KiB', '640 bytes')
    """
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.0f} MiB"
    if count >= 2**13:
        return f"{count / 2**10:.0f} KiB"
    return f"{count} bytes"
