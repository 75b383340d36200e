"""How a model is loaded: its dtype, its device, its attention, and whether its own code may run."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from headwise.base.progress import Progress, silent
from headwise.errors import LoadError, SpecError
from headwise.spec.dtypes import dtype_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# What becomes of a GGUF file's blocks.
WEIGHTS = ("float", "packed")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Args:
        dtype: of the weights: a name of `known_dtype`.
        device: that they go to: a name of `find_device`.
        attention: Transformers' name of an implementation.
        trust_remote_code: whether code that comes with the model may run.
        weights: of a GGUF file: "float", dequantised, or "packed", in the file's own blocks.
        progress: is told how far the work is.

    Raises:
        LoadError: a dtype or a device that there is not, or no such kind of weights.
    """

    dtype: str = "auto"
    device: str = "cpu"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    weights: str = "float"
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise LoadError(f"weights is {self.weights!r}, expected {' or '.join(WEIGHTS)}")
        known_dtype(self.dtype)
        find_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None keeps the checkpoint's own."""
        return DTYPES.get(known_dtype(self.dtype))

    @property
    def target(self) -> torch.device:
        """The device of that name."""
        return find_device(self.device)


def known_dtype(dtype: str) -> str:
    """PyTorch's name of one of the three dtypes, or "auto".

    >>> known_dtype("bf16"), known_dtype("auto")
    ('bfloat16', 'auto')

    Raises:
        LoadError: another one.
    """
    name = dtype
    if dtype != "auto":
        with suppress(SpecError):
            name = dtype_name(dtype)
    if name not in ("auto", *DTYPES):
        raise LoadError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return name


def find_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        LoadError: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    expected = "expected auto, cpu, cuda or cuda:1"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f"device {device!r} is unknown: {expected}") from error
    try:
        torch.empty(0, device=target)
    except NotImplementedError as error:
        raise LoadError(f"device {device!r} is not in this build of PyTorch: {expected}") from error
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise LoadError(f"device {device!r} cannot be used: {first[:150]}; {expected}") from error
    return target
