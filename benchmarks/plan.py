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

from headwise.measure.results import check_writable, write_whole
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
    table = Table(
        "model", "layers", "tokens", "needed", "headwise", "Transformers", box=box.MARKDOWN
    )
    for title, verified in found.values():
        cells = []
        for check in verified.caches:
            equal = check.predicted == check.measured
            cells.append(
                f"{check.predicted:,}" + ("" if equal else f", measured {check.measured:,}")
            )
        table.add_row(title, str(verified.layers), str(verified.context), *cells)
    return table


def times(found: dict[str, tuple[str, Verified]]) -> Table:
    table = Table(
        "model", "attention", "tokens", "predicted", "measured", "ratio", box=box.MARKDOWN
    )
    for title, verified in found.values():
        for time in verified.times:
            table.add_row(
                title,
                time.attention,
                f"{time.context:,}",
                f"{1e3 * time.predicted:.2f} ms",
                f"{1e3 * time.measured:.2f} ({1e3 * time.low:.2f}-{1e3 * time.high:.2f}) ms",
                f"{time.predicted / time.measured:.2f}",
            )
    return table


if __name__ == "__main__":
    main()
