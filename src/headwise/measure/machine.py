"""What the machine can do at best: how fast it reads memory, and how fast it multiplies matrices.

No kernel is faster than its bytes over the one and its FLOPs over the other (the roofline, Williams
et al. 2009, doi 10.1145/1498765.1498785), so these say how far a kernel is from done.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import psutil
import torch

from headwise.base.memory import available_bytes
from headwise.base.progress import silent
from headwise.errors import OptionError
from headwise.measure.environment import now

READS = 10
READ_BYTES = 2**30
PRODUCTS = 5
GEMM_SIZE = 4096
SMALLEST_GEMM = 512
# A quarter of the processors in use by others, or half of the repetitions a quarter slower.
_BUSY_OTHERS = 0.25
_BUSY_SPREAD = 1.25
# Seconds of looking at what else runs.
_LOOK = 0.2
# A dtype without kernels of its own takes minutes for one product: a smaller one says as much.
_LONGEST_PRODUCT = 2.0


@dataclass(frozen=True)
class Moment:
    """When something was measured, and how busy the machine was then.

    Args:
        taken: the time, as ISO 8601 in UTC.
        others: the share of all processors that was in use just before; None where not known.
        spread: the median repetition's time over that of the fastest; None where not known.
    """

    taken: str
    others: float | None = None
    spread: float | None = None

    @property
    def busy(self) -> bool | None:
        """Whether other work made the figure worse; None where that is not known.

        >>> Moment("2026-11-28T21:00+00:00", others=0.6, spread=1.05).busy
        True
        """
        if self.others is None or self.spread is None:
            return None
        return self.others > _BUSY_OTHERS or self.spread > _BUSY_SPREAD


@dataclass(frozen=True)
class Peak:
    """FLOP/s of the best product of two `size` x `size` matrices."""

    flops_per_second: float
    size: int
    moment: Moment | None = None


@dataclass(frozen=True)
class Figures:
    """The machine with a number of threads.

    `bytes_per_second` is the best of `READS` sums over `read_bytes` of float32; `peaks` has one
    entry a dtype.
    """

    threads: int
    bytes_per_second: float
    read_bytes: int
    peaks: dict[str, Peak]
    moment: Moment | None = None

    def share(self, bytes_per_second: float, flops_per_second: float, dtype: str) -> float:
        """How much of the roofline these rates are: of the one that binds, what there is of it.

        >>> figures = Figures(2, 10e9, 2**30, {"float32": Peak(100e9, 4096)})
        >>> figures.share(5e9, 20e9, "float32"), figures.share(1e9, 80e9, "float32")
        (0.5, 0.8)
        """
        return max(bytes_per_second / self.bytes_per_second, flops_per_second / self.peak(dtype))

    def peak(self, dtype: str) -> float:
        """FLOP/s that numbers of `dtype` can be multiplied at, as they are or widened.

        >>> Figures(2, 10e9, 2**30, {"float32": Peak(9e9, 64), "bfloat16": Peak(1e9, 64)}).peak(
        ...     "bfloat16"
        ... )
        9000000000.0
        """
        return self.peaks[self.binding(dtype)].flops_per_second

    def binding(self, dtype: str) -> str:
        """The dtype of that peak: float32 where the machine is slower in `dtype`."""
        wide = self.peaks.get("float32", self.peaks[dtype])
        return "float32" if wide.flops_per_second > self.peaks[dtype].flops_per_second else dtype

    def best_with(self, other: "Figures") -> "Figures":
        """The better of each figure, with the same threads: a busy moment makes them worse."""
        assert self.threads == other.threads
        peaks = dict(self.peaks)
        for dtype, peak in other.peaks.items():
            best = peaks.get(dtype, peak)
            peaks[dtype] = max(best, peak, key=lambda each: each.flops_per_second)
        read = max(self, other, key=lambda each: each.bytes_per_second)
        return replace(read, peaks=peaks)


def measure_machine(
    threads: int,
    dtypes: Iterable[str],
    *,
    read_bytes: int = READ_BYTES,
    gemm_size: int = GEMM_SIZE,
    progress: Callable[[str, int, int], object] = silent,
) -> Figures:
    """Measure bandwidth and GEMM peaks; `dtypes` by name.

    >>> figures = measure_machine(1, ["float32"], read_bytes=2**20, gemm_size=64)
    >>> figures.bytes_per_second > 0, figures.peaks["float32"].size
    (True, 64)
    """
    with use_threads(threads):
        progress(f"read bandwidth, {threads} threads", 0, 0)
        others = _in_use()
        rate, read, spread = read_bandwidth(read_bytes)
        moment = Moment(now("minutes"), others, spread)
        peaks = {}
        for dtype in dict.fromkeys(dtypes):
            progress(f"GEMM peak in {dtype}, {threads} threads", 0, 0)
            others = _in_use()
            peaks[dtype] = gemm_peak(getattr(torch, dtype), gemm_size, others)
    return Figures(threads, rate, read, peaks, moment)


def read_bandwidth(read_bytes: int = READ_BYTES) -> tuple[float, int, float]:
    """Bytes/s of the best of `READS` sums over a float32 tensor, its bytes, and the spread.

    Less than `read_bytes` is read where that is more than a quarter of the free memory.
    """
    free = available_bytes(torch.device("cpu")) // 4
    while read_bytes > max(free, 2**20):
        read_bytes //= 2
    numbers = torch.ones(read_bytes // 4)
    best, spread = _best(numbers.sum, READS)
    return read_bytes / best, read_bytes, spread


def gemm_peak(dtype: torch.dtype, size: int = GEMM_SIZE, others: float | None = None) -> Peak:
    """The best of `PRODUCTS` products of two square matrices of `size`, of a smaller size where
    one would take longer than two seconds. `others`: as in `Moment`.
    """
    small = min(size, SMALLEST_GEMM)
    took, _ = _best(_product(small, dtype), 2)
    while size > small and took * (size / small) ** 3 > _LONGEST_PRODUCT:
        size //= 2
    best, spread = _best(_product(size, dtype), PRODUCTS)
    return Peak(2 * size**3 / best, size, Moment(now("minutes"), others, spread))


def _product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.matmul(left, right, out=out)


def _in_use() -> float:
    """The share of all processors that is in use, while this process waits."""
    return float(psutil.cpu_percent(interval=_LOOK)) / 100


def _best(run: Callable[[], object], times: int) -> tuple[float, float]:
    """Seconds of the fastest of `times` runs, and the median run's time over it."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds), median(seconds) / min(seconds)


def check_threads(threads: int | None) -> int:
    """The number of threads to run with: PyTorch's own where none is asked for.

    Raises:
        OptionError: fewer than 1, or more than the machine has processors.
    """
    if threads is None:
        return torch.get_num_threads()
    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise OptionError(f"threads is {threads}; expected 1 to {most}, the machine's processors")
    return threads


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Run PyTorch with a number of threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
