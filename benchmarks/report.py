"""What every benchmark prints: the machine and versions, and a table of ratios."""

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from headwise.measure import Ratio
from headwise.measure.environment import environment as measured_on


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of both sides (medians), their ratio, what is behind it."""

    what: str
    stock: float
    ours: float
    ratio: Ratio
    note: str


def environment() -> str:
    """One line: processor, threads, versions."""
    found = measured_on()
    cpu = found["cpu"]
    return (
        f"{cpu['model']}, {cpu['torch_threads']} threads, {cpu['torch_capability']}; "
        f"headwise {found['headwise']}, torch {found['torch']}, "
        f"transformers {found['transformers']}"
    )


def operators(run: Callable[[], object]) -> str:
    """The attention operators of PyTorch that `run` dispatches to."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = {event.key for event in profiler.key_averages() if "scaled_dot_product" in event.key}
    return " > ".join(sorted(name.removeprefix("aten::") for name in names))


def print_table(title: str, stock: str, rows: list[Row]) -> None:
    """Print `rows` as a table that a wide terminal shows whole."""
    table = Table(
        "", stock, "headwise", "ratio (quartiles)", "behind it", title=title, box=box.MARKDOWN
    )
    for row in rows:
        times = (f"{1e3 * row.stock:.2f} ms", f"{1e3 * row.ours:.2f} ms")
        table.add_row(row.what, *times, str(row.ratio), row.note)
    Console(width=240).print(table)
