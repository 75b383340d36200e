"""What was measured of this machine, kept so that it need not be measured at every question."""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from headwise.errors import OptionError
from headwise.loading.kept import cache_folder
from headwise.measure.environment import environment
from headwise.measure.machine import Figures, Peak, measure_machine
from headwise.measure.results import write_whole


def kept_figures(threads: int, dtypes: Iterable[str]) -> Figures | None:
    """The figures of an earlier run on this machine, None if one of these is missing."""
    try:
        kept = json.loads(_file(threads).read_text(encoding="utf-8"))
        peaks = {dtype: Peak(**peak) for dtype, peak in kept["peaks"].items()}
        figures = Figures(threads, kept["bytes_per_second"], kept["read_bytes"], peaks)
        rates = [figures.bytes_per_second, *(peak.flops_per_second for peak in peaks.values())]
        whole = all(0 < rate < math.inf for rate in rates)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return figures if whole and set(dtypes) <= peaks.keys() else None


def keep_figures(figures: Figures) -> None:
    """Keep the figures for `kept_figures`, beside those of other dtypes that are kept already.

    Where they cannot be written, they are measured again the next time.
    """
    file = _file(figures.threads)
    before = kept_figures(figures.threads, ())
    peaks = {} if before is None else before.peaks
    merged = Figures(
        figures.threads, figures.bytes_per_second, figures.read_bytes, peaks | figures.peaks
    )
    with suppress(OSError, OptionError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(merged)).encode())


def machine_figures(
    threads: int,
    dtypes: Iterable[str],
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Figures:
    """The kept figures, measured first where there are none (some 10 s)."""
    wanted = list(dtypes)
    figures = kept_figures(threads, wanted)
    if figures is None:
        figures = measure_machine(threads, wanted, progress=progress)
        keep_figures(figures)
    return figures


def _file(threads: int) -> Path:
    """One file for a processor, a PyTorch and a number of threads."""
    model = environment()["cpu"]["model"]
    name = "".join(letter if letter.isalnum() else "-" for letter in model) or "unknown"
    return cache_folder("machine") / f"{name}-torch{torch.__version__}-{threads}.json"
