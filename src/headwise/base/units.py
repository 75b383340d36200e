"""Numbers with units, as people write them: 128k tokens, 24GiB, 3.35TB/s, 989TFLOP/s."""

import re
from decimal import Decimal

from headwise.errors import OptionError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
# More digits than any size has: what is longer is no number here.
_NUMBER = r"(\d{1,20}(?:\.\d{1,9})?|\.\d{1,9})\s*"


def tokens(option: str, text: str) -> int:
    """A number of tokens; k is 1024 and M 1024 * 1024.

    >>> tokens("context", "128k"), tokens("context", "8000")
    (131072, 8000)

    Raises:
        OptionError: anything else.
    """
    match = re.fullmatch(_NUMBER + r"([km]?)", text.strip().lower())
    value = Decimal(match[1]) * 1024 ** _POWERS[match[2]] if match else Decimal(0)
    if value < 1 or value != int(value):
        raise OptionError(f"{option} is {text!r}, expected a number of tokens, as 8192 or 128k")
    return int(value)


def token_counts(option: str, text: str) -> list[int]:
    """Numbers of tokens, joined by commas.

    >>> token_counts("contexts", "100,8k")
    [100, 8192]

    Raises:
        OptionError: anything else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise OptionError(f"{option} is {text!r}, expected numbers of tokens, as 100,2000,8k")
    return [tokens(option, part) for part in parts]


def size(option: str, text: str) -> int:
    """A number of bytes: GiB counts in powers of 1024, GB of 1000, a bare G as GiB.

    >>> size("memory", "24GiB"), size("memory", "80GB")
    (25769803776, 80000000000)

    Raises:
        OptionError: anything else.
    """
    match = re.fullmatch(_NUMBER + r"([kmgtp])(i?)(b?)", text.strip().lower())
    if match is None:
        raise OptionError(f"{option} is {text!r}, expected a size, as 24GiB, 80GB or 512MiB")
    base = 1000 if match[4] and not match[3] else 1024
    return int(Decimal(match[1]) * base ** _POWERS[match[2]])


def limit(option: str, value: str | int) -> int:
    """A number of bytes above 0, as a number or as `size` reads it.

    >>> limit("cache_limit", "4GB"), limit("cache_limit", 2**20)
    (4000000000, 1048576)

    Raises:
        OptionError: anything else.
    """
    if isinstance(value, int | str) and not isinstance(value, bool):
        most = value if isinstance(value, int) else size(option, value)
        if most > 0:
            return most
    raise OptionError(f"{option} is {value!r}, expected a size, as 10GB")


def bandwidth(option: str, text: str) -> float:
    """Bytes per second.

    >>> bandwidth("bandwidth", "3.35TB/s"), bandwidth("bandwidth", "50GB/s")
    (3350000000000.0, 50000000000.0)

    Raises:
        OptionError: anything else.
    """
    return _rate(option, text, r"b(?:/s|ps)?", "bytes per second, as 50GB/s or 3.35TB/s")


def flops(option: str, text: str) -> float:
    """Floating-point operations per second.

    >>> flops("peak", "989TFLOP/s"), flops("peak", "150 GFLOPS")
    (989000000000000.0, 150000000000.0)

    Raises:
        OptionError: anything else.
    """
    expected = "operations per second, as 150GFLOP/s or 989TFLOP/s"
    return _rate(option, text, r"flops?(?:/s|ps)?", expected)


def _rate(option: str, text: str, unit: str, expected: str) -> float:
    """A number with a decimal prefix and a `unit`, a pattern."""
    match = re.fullmatch(_NUMBER + r"([kmgtp])" + unit, text.strip().lower())
    if match is None:
        raise OptionError(f"{option} is {text!r}, expected {expected}")
    return float(match[1]) * 10 ** (3 * _POWERS[match[2]])
