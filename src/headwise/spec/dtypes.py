"""Bytes per cached element, by the dtype's name, so that this floor needs no torch.

Quantised caches also hold scales; what they cost is theirs to say, so their dtypes are not here.
"""

from typing import Protocol, TypeAlias

from headwise.errors import SpecError
from headwise.spec.checks import shown


class NamedDtype(Protocol):
    """A dtype object, such as `torch.bfloat16`, known by what `str` makes of it."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""


Dtype: TypeAlias = str | NamedDtype

_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
_ALIASES = {
    "double": "float64",
    "fp64": "float64",
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
}


def dtype_name(dtype: Dtype) -> str:
    """The name that PyTorch has for a dtype.

    >>> dtype_name("bf16")
    'bfloat16'

    Raises:
        SpecError: for a name that is not a floating-point dtype known here.
    """
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in _BYTES:
        known = ", ".join([*_BYTES, *_ALIASES])
        raise SpecError(f"dtype={shown(dtype)}: expected a torch dtype or one of {known}")
    return name


def bytes_per_element(dtype: Dtype) -> int:
    """Bytes that one element of `dtype` takes; `dtype` is a torch.dtype or its name.

    >>> bytes_per_element("bf16"), bytes_per_element("torch.float32")
    (2, 4)

    Raises:
        SpecError: for a name that is not a floating-point dtype known here.
    """
    return _BYTES[dtype_name(dtype)]
