"""`headwise env`: versions, the machine, and which backends can run on it."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

# What the kernels of PyTorch and headwise choose between; x86 first, then Arm.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "fphp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def env(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Show versions, CPU features, threads, memory, devices and backends."""
    found = facts()
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    _show(found)


def facts() -> dict[str, Any]:
    """What this machine and installation offer, as plain data; sizes in bytes."""
    import psutil
    import torch

    from headwise.ops import backends

    memory = psutil.virtual_memory()
    asked = [(backend.name, *backend.available()) for backend in backends()]
    return {
        "headwise": version("headwise"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "system": platform.platform(),
        "cpu": {
            "model": _cpu_info("model name", "Model") or platform.processor(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": _features(),
            "cores": psutil.cpu_count(logical=False),
            "logical": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
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


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    cpu, memory = found["cpu"], found["memory"]
    rows = {
        "headwise": found["headwise"],
        "Python": found["python"],
        "PyTorch": found["torch"],
        "Transformers": found["transformers"] or "not installed: pip install 'headwise[hf]'",
        "system": found["system"],
        "CPU": cpu["model"],
        "CPU features": " ".join(cpu["features"]) or "unknown",
        "PyTorch's kernels": cpu["torch_capability"],
        "threads": f"{cpu['torch_threads']} of {cpu['logical']} logical ({cpu['cores']} cores)",
        "memory": f"{_gib(memory['available'])} free of {_gib(memory['total'])}",
    }
    for index, device in enumerate(found["cuda"]):
        size = _gib(device["memory"])
        rows[f"cuda:{index}"] = f"{device['name']}, capability {device['capability']}, {size}"
    if not found["cuda"]:
        rows["CUDA"] = "no device"
    for backend in found["backends"]:
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        rows[f"backend {backend['name']}"] = state
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    Console(file=sys.stdout, highlight=False).print(table)
