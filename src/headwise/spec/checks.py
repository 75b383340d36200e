"""Checks of single values; each returns the value or raises an error that names the field."""

import sys

from headwise.errors import ShapeError, SpecError


def integer(name: str, value: object, *, least: int) -> int:
    """Return `value` when it is an integer of at least `least`.

    >>> integer("max_window_layers", 0, least=0)
    0

    Raises:
        SpecError: for anything else; `True` is not a number of layers.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(
            f"{name}={value!r}: expected an integer of at least {least}; correct {name}"
        )
    return value


def positive_int(name: str, value: object) -> int:
    """Return `value` when it is an integer of at least 1.

    >>> positive_int("heads", 9)
    9

    Raises:
        SpecError: for anything else.
    """
    return integer(name, value, least=1)


def finite(name: str, value: object) -> float:
    """Return `value` as a float when it is a finite number above 0.

    >>> finite("softcap", 50)
    50.0

    Raises:
        SpecError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{name}={value!r}: expected a finite number above 0; correct {name}")
    # The upper bound also turns away integers that no float can hold, the lower one NaN.
    if not 0 < value <= sys.float_info.max:
        raise SpecError(f"{name}={value!r}: expected a finite number above 0; correct {name}")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """Return `value` when it is True or False.

    >>> boolean("causal", True)
    True

    Raises:
        SpecError: for anything else.
    """
    if not isinstance(value, bool):
        raise SpecError(f"{name}={value!r}: expected True or False; correct {name}")
    return value


def token_count(name: str, value: object, *, least: int = 0) -> int:
    """Return `value` when it is an integer of at least `least`.

    >>> token_count("context", 4096)
    4096

    Raises:
        ShapeError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ShapeError(f"{name}={value!r}: expected an integer of at least {least}")
    return value
