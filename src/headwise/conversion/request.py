"""What a conversion may be asked for, checked before any work is done."""

import os
from pathlib import Path

from headwise.conversion.target import Target
from headwise.errors import OptionError

METHODS = ("aware", "naive")


def check_options(
    target: Target,
    *,
    calibration: object,
    out: Path,
    method: str,
    tokens: int,
    length: int,
    tune: int,
) -> None:
    """Refuse what cannot be carried out.

    >>> from headwise.conversion.target import Target
    >>> sizes = {"tokens": 64, "length": 32, "tune": 0}
    >>> check_options(
    ...     Target.parse("mqa"), calibration=None, out=Path("new"), method="aware", **sizes
    ... )
    Traceback (most recent call last):
    headwise.errors.OptionError: calibration is missing: mqa drops what a text shows to matter ...

    Raises:
        OptionError: names the option that is out of range or missing.
    """
    if calibration is None and not target.exact:
        raise OptionError(
            f"calibration is missing: {target} drops what a text shows to matter least; give a "
            "text file with --calibration"
        )
    if calibration is None and tune:
        raise OptionError("tune needs a text: give a text file with --calibration")
    if method not in METHODS:
        raise OptionError(f"method is {method!r}, expected {' or '.join(METHODS)}")
    for name, count in (("tokens", tokens), ("length", length), ("tune", tune)):
        if not isinstance(count, int):
            raise OptionError(f"{name} is {count!r}, expected a whole number")
    if length < 2:
        raise OptionError(f"length is {length}, expected at least 2 tokens")
    if tokens < length:
        raise OptionError(f"tokens is {tokens}, expected at least one sequence of {length}")
    if tune and target.exact:
        raise OptionError(
            f"tune is {tune}, and {target} equals the original: there is nothing to tune"
        )
    if tune < 0:
        raise OptionError(f"tune is {tune}, expected a number of steps, 0 for none")
    _check_out(out)


def _check_out(out: Path) -> None:
    """The result is made beside `out` and then renamed, so that its parent is written."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"out is {out}, which is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise OptionError(f"out is {out}, which is not empty; give a new folder")
    if out.is_mount():
        raise OptionError(f"out is {out}, where a disk is mounted; give a new folder on it")
    above = next(at for at in out.parents if at.exists())
    if not (above.is_dir() and os.access(above, os.R_OK | os.W_OK | os.X_OK)):
        raise OptionError(f"out is {out}, and {above} cannot be written; give a folder of yours")
