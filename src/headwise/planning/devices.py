"""What runs the model: this machine, as measured, or a device as its maker describes it."""

import difflib
from dataclasses import dataclass, field, replace

import psutil
import torch

from headwise.base.progress import Progress, silent
from headwise.errors import OptionError
from headwise.measure.figures_store import described, machine_figures
from headwise.spec.checks import shown

# Bytes, bytes per second and operations per second beyond all machines.
_MOST = 2**80


@dataclass(frozen=True)
class Device:
    """How fast something reads and multiplies, and how much it holds.

    Args:
        name: what to call it.
        bytes_per_second: of reading memory.
        flops_per_second: of dense matrix products, by the operands' dtype.
        memory: bytes.
        source: where these figures are from.
    """

    name: str
    bytes_per_second: float
    flops_per_second: dict[str, float] = field(hash=False)
    memory: int
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`; in float32 where the device has no figure for it."""
        return self.flops_per_second.get(dtype, self.flops_per_second["float32"])

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        """The least time that reading and computing take, where neither waits for the other.

        Source: the roofline, Williams et al. 2009, doi 10.1145/1498765.1498785.
        """
        return max(nbytes / self.bytes_per_second, flops / self.peak(dtype))


def _gpu(name: str, mib: int, tb: float, half: float, single: float, source: str) -> Device:
    """A device whose driver reports `mib` of memory; TB/s and TFLOP/s."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    source = f"the maker's peaks, without sparsity, by {source}; memory by the driver"
    return Device(name, tb * 1e12, flops, mib * 2**20, source)


_A100 = "https://glennklockwood.com/garden/processors/A100"
_H100 = "https://glennklockwood.com/garden/processors/h100"
_H200 = f"{_H100} and https://www.saulelectric.com/nvidia-h200.html"
_L40S = "https://www.mullet.se/product.html?product_id=355414"
_4090 = "https://waredb.com/processor/nvidia-geforce-rtx-4090"
DEVICES = {
    "a100-80gb": _gpu("A100 80 GB SXM", 81_920, 2.039, 312, 19.5, _A100),
    "h100": _gpu("H100 SXM", 81_559, 3.35, 989.4, 66.9, _H100),
    "h200": _gpu("H200 SXM", 143_771, 4.8, 989.4, 66.9, _H200),
    "l40s": _gpu("L40S", 46_068, 0.864, 362.05, 91.6, _L40S),
    "rtx-4090": _gpu("RTX 4090", 24_564, 1.008, 165.15, 82.58, _4090),
}


def find_device(
    name: str | None,
    dtype: str,
    *,
    bandwidth: float | None = None,
    peak: float | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Device:
    """A device by name, this machine where there is none; the figures that are given hold instead.

    >>> find_device("h100", "bfloat16", bandwidth=3e12).bytes_per_second
    3000000000000.0

    Raises:
        OptionError: an unknown name, with those that are near; figures that are not above 0.
    """
    for option, value in (("memory", memory), ("bandwidth", bandwidth), ("peak", peak)):
        if value is not None:
            _check_number(option, value, whole=option == "memory")
    if not isinstance(name, str | None):
        raise OptionError(f"device is {shown(name)}, expected a name, or none for this machine")
    if name is None and bandwidth is not None and peak is not None:
        device = Device("a machine as given", 0, {}, psutil.virtual_memory().total, "as given")
    elif name is None:
        device = _this_machine(dtype, progress)
    elif name.lower() in DEVICES:
        device = DEVICES[name.lower()]
    else:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=2, cutoff=0.3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(DEVICES)
        raise OptionError(
            f"device is {shown(name)}, expected one of {known}, or none for this machine{hint}"
        )
    if bandwidth is not None:
        device = replace(device, bytes_per_second=float(bandwidth))
    if peak is not None:
        device = replace(device, flops_per_second={"float32": float(peak), dtype: float(peak)})
    return device if memory is None else replace(device, memory=memory)


def _check_number(option: str, value: float, whole: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < _MOST or (whole and value != int(value)):
        raise OptionError(f"{option} is {shown(value)}, expected a number above 0")


def _this_machine(dtype: str, progress: Progress) -> Device:
    wanted = dict.fromkeys(["float32", dtype])
    figures, instead = machine_figures(torch.get_num_threads(), wanted, progress)
    return Device(
        "this machine",
        figures.bytes_per_second,
        {each: figures.peak(each) for each in wanted},
        psutil.virtual_memory().total,
        described(figures, dtype) + (f"; {instead}, so not used" if instead else ""),
    )
