"""What the machine can do at best: how fast it reads memory, and how fast it multiplies matrices.

No kernel is faster than its bytes over the one and its FLOPs over the other (the roofline, Williams
et al. 2009, doi 10.1145/1498765.1498785), so these say how far a kernel is from done.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from headwise.errors import OptionError
from headwise.loading.memory import available_bytes

READS = 10
READ_BYTES = 2**30
PRODUCTS = 5
GEMM_SIZE = 4096
# A dtype without kernels of its own takes minutes for one product: a smaller one says as much.
_LONGEST_PRODUCT = 2.0


@dataclass(frozen=True)
class Peak:
    """FLOP/s of the best product of two `size` x `size` matrices."""

    flops_per_second: float
    size: int


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
        rate = max(self.bytes_per_second, other.bytes_per_second)
        return replace(self, bytes_per_second=rate, peaks=peaks)


def measure_machine(
    threads: int,
    dtypes: Iterable[str],
    *,
    read_bytes: int = READ_BYTES,
    gemm_size: int = GEMM_SIZE,
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Figures:
    """Measure bandwidth and GEMM peaks; `dtypes` by name.

    >>> figures = measure_machine(1, ["float32"], read_bytes=2**20, gemm_size=64)
    >>> figures.bytes_per_second > 0, figures.peaks["float32"].size
    (True, 64)
    """
    with use_threads(threads):
        progress(f"read bandwidth, {threads} threads", 0, 0)
        rate, read = read_bandwidth(read_bytes)
        peaks = {}
        for dtype in dict.fromkeys(dtypes):
            progress(f"GEMM peak in {dtype}, {threads} threads", 0, 0)
            peaks[dtype] = gemm_peak(getattr(torch, dtype), gemm_size)
    return Figures(threads, rate, read, peaks)


def read_bandwidth(read_bytes: int = READ_BYTES) -> tuple[float, int]:
    """Bytes/s of the best of `READS` sums over a float32 tensor, and the bytes of that tensor.

    Less than `read_bytes` is read where that is more than a quarter of the free memory.
    """
    free = available_bytes(torch.device("cpu")) // 4
    while read_bytes > max(free, 2**20):
        read_bytes //= 2
    numbers = torch.ones(read_bytes // 4)
    return read_bytes / _best(numbers.sum, READS), read_bytes


def gemm_peak(dtype: torch.dtype, size: int = GEMM_SIZE) -> Peak:
    """The best of `PRODUCTS` products of two square matrices of `size`, of a smaller size where
    one would take longer than two seconds.
    """
    small = min(size, 512)
    took = _best(_product(small, dtype), 2)
    while size > small and took * (size / small) ** 3 > _LONGEST_PRODUCT:
        size //= 2
    return Peak(2 * size**3 / _best(_product(size, dtype), PRODUCTS), size)


def _product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.matmul(left, right, out=out)


def _best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of `times` runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


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
