"""Checks of single values; each returns the value or raises an error that names the field."""

import sys

from headwise.errors import ShapeError, SpecError

# More than any size of a model; sizes are multiplied, and turned into floats.
_MOST = 2**53
_LONGEST = 100


def shown(value: object) -> str:
    """A value as an error shows it: on one line, and cut where it is long.

    >>> shown([1, 2]), len(shown("x" * 1000))
    ('[1, 2]', 100)
    """
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # more digits or deeper than Python prints
        text = f"<{type(value).__name__}, too long to print>"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def integer(name: str, value: object, *, least: int) -> int:
    """Return `value` when it is an integer of at least `least`.

    >>> integer("max_window_layers", 0, least=0)
    0

    Raises:
        SpecError: for anything else; `True` is not a number of layers.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(
            f"{name}={shown(value)}: expected an integer of at least {least}; correct {name}"
        )
    if value > _MOST:
        raise SpecError(f"{name}={shown(value)}: expected at most {_MOST:,}; correct {name}")
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
        raise SpecError(f"{name}={shown(value)}: expected a finite number above 0; correct {name}")
    # The upper bound also turns away integers that no float can hold, the lower one NaN.
    if not 0 < value <= sys.float_info.max:
        raise SpecError(f"{name}={shown(value)}: expected a finite number above 0; correct {name}")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """Return `value` when it is True or False.

    >>> boolean("causal", True)
    True

    Raises:
        SpecError: for anything else.
    """
    if not isinstance(value, bool):
        raise SpecError(f"{name}={shown(value)}: expected True or False; correct {name}")
    return value


def token_count(name: str, value: object, *, least: int = 0) -> int:
    """Return `value` when it is an integer of at least `least`.

    >>> token_count("context", 4096)
    4096

    Raises:
        ShapeError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ShapeError(f"{name}={shown(value)}: expected an integer of at least {least}")
    return value
