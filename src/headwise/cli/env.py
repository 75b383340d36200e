"""`headwise env`: versions, the machine, and which backends can run on it."""

from typing import Any

from headwise.cli.options import Json, print_json


def env(
    as_json: Json = False,
) -> None:
    """Show versions, CPU features, threads, memory, devices and backends."""
    from headwise.measure.environment import environment

    if as_json:
        print_json(environment())
    else:
        _show(environment())


def _show(facts: dict[str, Any]) -> None:
    from headwise.base.console import facts_table, show
    from headwise.base.memory import gib

    cpu, memory = facts["cpu"], facts["memory"]
    rows = {
        "headwise": facts["headwise"],
        "Python": facts["python"],
        "PyTorch": facts["torch"],
        "Transformers": facts["transformers"] or "not installed: pip install 'headwise[hf]'",
        "system": facts["system"],
        "CPU": cpu["model"],
        "CPU features": " ".join(cpu["features"]) or "unknown",
        "last-level cache": gib(cpu["last_level_cache"]) if cpu["last_level_cache"] else "unknown",
        "PyTorch's kernels": cpu["torch_capability"],
        "threads": f"{cpu['torch_threads']} of {cpu['logical']} logical ({cpu['cores']} cores)",
        "memory": f"{gib(memory['available'])} free of {gib(memory['total'])}",
    }
    for index, device in enumerate(facts["cuda"]):
        size = gib(device["memory"])
        rows[f"cuda:{index}"] = f"{device['name']}, capability {device['capability']}, {size}"
    if not facts["cuda"]:
        rows["CUDA"] = "no device"
    for backend in facts["backends"]:
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        rows[f"backend {backend['name']}"] = state
    show(facts_table((name, str(value)) for name, value in rows.items()))
