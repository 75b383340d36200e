"""`headwise env`: versions, the machine, and which backends can run on it."""

import sys
from typing import Any

from headwise.cli.options import Json, print_json


def env(
    as_json: Json = False,
) -> None:
    """Show versions, CPU features, threads, memory, devices and backends."""
    from headwise.measure.environment import environment

    found = environment()
    if as_json:
        print_json(found)
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from headwise.base.console import one_line
    from headwise.base.memory import gib

    cpu, memory = found["cpu"], found["memory"]
    rows = {
        "headwise": found["headwise"],
        "Python": found["python"],
        "PyTorch": found["torch"],
        "Transformers": found["transformers"] or "not installed: pip install 'headwise[hf]'",
        "system": found["system"],
        "CPU": cpu["model"],
        "CPU features": " ".join(cpu["features"]) or "unknown",
        "last-level cache": gib(cpu["last_level_cache"]) if cpu["last_level_cache"] else "unknown",
        "PyTorch's kernels": cpu["torch_capability"],
        "threads": f"{cpu['torch_threads']} of {cpu['logical']} logical ({cpu['cores']} cores)",
        "memory": f"{gib(memory['available'])} free of {gib(memory['total'])}",
    }
    for index, device in enumerate(found["cuda"]):
        size = gib(device["memory"])
        rows[f"cuda:{index}"] = f"{device['name']}, capability {device['capability']}, {size}"
    if not found["cuda"]:
        rows["CUDA"] = "no device"
    for backend in found["backends"]:
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        rows[f"backend {backend['name']}"] = state
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(one_line(str(value))))
    Console(file=sys.stdout, highlight=False).print(table)
