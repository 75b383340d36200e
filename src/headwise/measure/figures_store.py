"""The machine's figures in a file, so that they need not be measured at every question.

Each figure is kept with its size, the time it was taken and whether the machine was busy. Figures
without these, of toy sizes or damaged are not used, and whoever asks is told why.
"""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from headwise.base.files import cache_folder, kind_of, one_line, read_json
from headwise.base.progress import silent
from headwise.base.records import record
from headwise.base.written import write_whole
from headwise.errors import LoadError, OptionError
from headwise.measure.environment import environment, last_level_cache
from headwise.measure.inputs import ASSUMED_CACHE
from headwise.measure.machine import READ_BYTES, SMALLEST_GEMM, Figures, measure_machine

# No fewer bytes than this are read, whatever the system says of its caches.
_LEAST_BYTES = 2**26


def kept_figures(threads: int, dtypes: Iterable[str]) -> Figures | None:
    """The figures of an earlier run on this machine, None if one of these is missing."""
    kept = _kept(threads, dtypes)
    return kept if isinstance(kept, Figures) else None


def keep_figures(figures: Figures) -> str:
    """Keep the figures for `kept_figures`, beside those of other dtypes that are kept already.

    Returns why they are not kept; nothing where they are. Figures of toy sizes say nothing of the
    machine. Where the file cannot be written, they are measured again the next time.
    """
    toy = _toy(figures)
    if toy:
        return toy
    file = _file(figures.threads)
    before = kept_figures(figures.threads, ())
    merged = replace(figures, peaks=({} if before is None else before.peaks) | figures.peaks)
    with suppress(OSError, OptionError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(merged)).encode())
        return ""
    return f"{file.parent} cannot be written"


def machine_figures(
    threads: int,
    dtypes: Iterable[str],
    progress: Callable[[str, int, int], object] = silent,
) -> tuple[Figures, str]:
    """The kept figures, measured first where there are none (some 10 s).

    Returns them and, where figures were kept and could not be used, why.
    """
    wanted = list(dtypes)
    kept = _kept(threads, wanted)
    if isinstance(kept, Figures):
        return kept, ""
    if kept:
        progress(f"measuring this machine: {kept}", 0, 0)
    figures = measure_machine(threads, wanted, progress=progress)
    keep_figures(figures)
    return figures, kept


def described(figures: Figures, dtype: str) -> str:
    """When, of what and how quietly the figures for one dtype were taken.

    >>> from headwise.measure.machine import Moment, Peak
    >>> moment = Moment("2020-02-01T10:00+00:00", others=0.0, spread=1.5)
    >>> figures = Figures(2, 1e10, 2**30, {"float32": Peak(1e11, 4096, moment)}, moment)
    >>> described(figures, "float32").partition("threads: ")[2]
    'sums over 1,024 MiB, products of 4,096 x 4,096; the machine was busy'
    """
    peak = figures.peaks[figures.binding(dtype)]
    moments = [each for each in (figures.moment, peak.moment) if each is not None]
    taken = min((datetime.fromisoformat(each.taken) for each in moments), default=None)
    when = "" if taken is None else f" {taken:%Y-%m-%d} ({_age(taken)})"
    states = {each.busy for each in moments} or {None}
    state = "; whether the machine was busy is not known" if None in states else ""
    state = "; the machine was busy" if True in states else state
    return (
        f"measured{when} with {figures.threads} threads: sums over "
        f"{figures.read_bytes / 2**20:,.0f} MiB, products of {peak.size:,} x {peak.size:,}{state}"
    )


def _age(taken: datetime) -> str:
    days = (datetime.now(UTC) - taken).days
    return "today" if days < 1 else "1 day ago" if days == 1 else f"{days:,} days ago"


def _toy(figures: Figures) -> str:
    """Why the figures are too small to say something of the machine; nothing where they are not."""
    cache = last_level_cache() or ASSUMED_CACHE
    least = min(READ_BYTES, max(_LEAST_BYTES, 2 * cache))
    if figures.read_bytes < least:
        return f"the kept figures are of {figures.read_bytes:,} bytes, which caches hold"
    for dtype, peak in figures.peaks.items():
        if peak.size < SMALLEST_GEMM:
            return f"the kept figures are of {dtype} matrices of {peak.size} x {peak.size}"
    return ""


def _kept(threads: int, dtypes: Iterable[str]) -> Figures | str:
    """The kept figures, or why what is kept cannot be used (nothing where nothing is kept)."""
    file = _file(threads)
    try:
        # a folder or a pipe is no file that was kept
        if kind_of(file) != "file":
            return ""
        kept = read_json(file)
        if "moment" not in kept:
            return "the kept figures do not say when they were taken"
        with one_line(f"{file} holds no figures"):
            figures: Figures = record(Figures, kept | {"threads": threads})
            _check(figures)
    except LoadError:
        return "the kept figures are damaged"
    return _toy(figures) or (figures if set(dtypes) <= figures.peaks.keys() else "")


def _check(figures: Figures) -> None:
    """Raise for numbers that no machine has, and for a time that is none."""
    peaks = figures.peaks.values()
    numbers = [figures.bytes_per_second, figures.read_bytes]
    numbers += [number for peak in peaks for number in (peak.flops_per_second, peak.size)]
    if not all(0 < number <= sys.float_info.max for number in numbers):
        raise ValueError(f"figures are {numbers}")
    for moment in (figures.moment, *(peak.moment for peak in peaks)):
        if moment is None or datetime.fromisoformat(moment.taken).tzinfo is None:
            raise ValueError(f"{moment} does not say when, and in which time zone")
        if not all(rate is None or 0 <= rate < 2**20 for rate in (moment.others, moment.spread)):
            raise ValueError(f"{moment} has shares that cannot be")


def _file(threads: int) -> Path:
    """One file for a processor, a PyTorch and a number of threads."""
    model = environment()["cpu"]["model"]
    name = "".join(letter if letter.isalnum() else "-" for letter in model) or "unknown"
    return cache_folder("machine") / f"{name}-torch{torch.__version__}-{threads}.json"
