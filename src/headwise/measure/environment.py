"""What a figure was measured on: versions, processor, memory, devices and backends."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What the kernels of PyTorch and headwise choose between; x86 first, then Arm.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "fphp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}


def environment() -> dict[str, Any]:
    """What this machine and installation offer, as plain data; sizes in bytes.

    >>> environment()["cpu"]["torch_threads"] >= 1
    True
    """
    import psutil
    import torch

    from headwise.ops import backends

    memory = psutil.virtual_memory()
    asked = [(backend.name, *backend.available()) for backend in backends()]
    return {
        "headwise": version("headwise"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "system": platform.platform(),
        "cpu": {
            "model": _cpu_info("model name", "Model") or platform.processor(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": _features(),
            "cores": psutil.cpu_count(logical=False),
            "logical": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "last_level_cache": last_level_cache(),
        },
        "memory": {"total": memory.total, "available": memory.available},
        "cuda": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "memory": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ],
        "backends": [
            {"name": name, "available": available, "reason": reason}
            for name, available, reason in asked
        ],
    }


def now(precision: str = "seconds") -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)


def installed(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def last_level_cache(caches: Path = _CACHES) -> int | None:
    """Bytes of the first processor's last-level cache; None where the system does not say.

    `caches` holds one folder per cache, as Linux has it in /sys.
    """
    levels: list[tuple[int, int]] = []
    for folder in caches.glob("index*"):
        try:
            level, kind, size = (
                (folder / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in _SIZES:
            levels.append((int(level), int(size[:-1]) * _SIZES[size[-1]]))
    return max(levels)[1] if levels else None


def _cpu_info(*names: str) -> str:
    """The first value of /proc/cpuinfo under one of these names; "" where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _features() -> list[str]:
    flags = set(_cpu_info("flags", "Features").split())
    return [feature for feature in _FEATURES if feature in flags]
