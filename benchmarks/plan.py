"""What `headwise plan` predicts beside what is measured, for models of every kind.

    python benchmarks/plan.py --out benchmarks/results/MACHINE-plan.json

For each model: the cache of its attention, run at reduced depth, in bytes; and the time of one
layer's attention in a decode step, predicted from rates that were measured in the same rounds on
other shapes. Takes some minutes; leave the machine alone meanwhile.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from report import environment
from rich import box
from rich.console import Console
from rich.table import Table

from headwise.base.written import check_writable, write_whole
from headwise.planning import Verified, plan, verify

MODELS = (
    "gpt2",
    "t5-base",
    "falcon-7b",
    "falcon-40b",
    "llama-3.1-405b",
    "mistral-7b-v0.1",
    "mixtral-8x7b",
    "gemma-3-27b",
    "gpt-oss-20b",
    "qwen2.5-7b",
    "qwen3-next-80b-a3b",
    "smollm2-135m",
    "deepseek-v2-lite",
    "deepseek-v3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.out is not None:
        check_writable(given.out)
    found = {}
    for name in given.models.split(","):
        print(name, file=sys.stderr)
        planned = plan(name, dtype="bfloat16", bandwidth=1e10, peak=1e11)
        found[name] = planned.model.name, verify(planned)
    machine = environment()
    print(machine)
    console = Console(width=200)
    console.print(caches(found))
    console.print(times(found))
    if given.out is not None:
        results = {name: dataclasses.asdict(verified) for name, (_, verified) in found.items()}
        command = shlex.join(["python", *sys.argv])
        report = {"command": command, "environment": machine, "results": results}
        write_whole(given.out, (json.dumps(report, indent=1) + "\n").encode())


def caches(found: dict[str, tuple[str, Verified]]) -> Table:
    names = ("model", "layers", "tokens", "needed", "headwise", "Transformers")
    table = Table(*names, box=box.MARKDOWN)
    for title, verified in found.values():
        cells = [f"{check.measured:,}" for check in verified.caches]
        for at, check in enumerate(verified.caches):
            if check.predicted != check.measured:
                cells[at] += f", predicted {check.predicted:,}"
        table.add_row(title, str(verified.layers), f"{verified.context:,}", *cells)
    return table


def times(found: dict[str, tuple[str, Verified]]) -> Table:
    contexts = sorted({time.context for _, at in found.values() for time in at.times})
    names = [f"{context // 1024}k" for context in contexts]
    table = Table("model", "attention", *names, box=box.MARKDOWN)
    for title, verified in found.values():
        for attention in dict.fromkeys(time.attention for time in verified.times):
            cells = dict.fromkeys(contexts, "")
            for time in verified.times:
                if time.attention == attention:
                    ratio = time.predicted / time.measured
                    cells[time.context] = f"{ratio:.2f} ({1e3 * time.measured:.3g} ms)"
            table.add_row(title, attention, *cells.values())
    return table


if __name__ == "__main__":
    main()
