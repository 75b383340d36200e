"""What a conversion is asked for, checked before any work is done."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.base.memory import gib
from headwise.conversion.checkpoint.workspace import file_digest, model_state
from headwise.conversion.target import Target
from headwise.errors import CapacityError, OptionError
from headwise.loading.source import Source
from headwise.loading.weight_files import weight_bytes

METHODS = ("aware", "naive")
# A folder is as large as its weights; this much more is its vocabulary and configs.
_SLACK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """The options of `convert`, which says what they mean, as one value.

    >>> from headwise.conversion.target import Target
    >>> ConversionRequest(target=Target.parse("mqa"), out=Path("new"))
    Traceback (most recent call last):
    headwise.errors.OptionError: calibration is missing: mqa drops what a text shows to matter ...

    Raises:
        OptionError: names the option that is out of range or missing.
    """

    target: Target
    out: Path
    calibration: Path | None = None
    method: str = "aware"
    tokens: int = 16384
    length: int = 512
    tune: int = 0

    def __post_init__(self) -> None:
        if self.calibration is None and not self.target.exact:
            raise OptionError(
                f"calibration is missing: {self.target} drops what a text shows to matter least; "
                "give a text file with --calibration"
            )
        if self.calibration is None and self.tune:
            raise OptionError("tune needs a text: give a text file with --calibration")
        if self.method not in METHODS:
            raise OptionError(f"method is {self.method!r}, expected {' or '.join(METHODS)}")
        for name in ("tokens", "length", "tune"):
            if not isinstance(count := getattr(self, name), int):
                raise OptionError(f"{name} is {count!r}, expected a whole number")
        if self.length < 2:
            raise OptionError(f"length is {self.length}, expected at least 2 tokens")
        if self.tokens < self.length:
            raise OptionError(
                f"tokens is {self.tokens}, expected at least one sequence of {self.length}"
            )
        if self.tune and self.target.exact:
            raise OptionError(
                f"tune is {self.tune}, and {self.target} equals the original: there is nothing to "
                "tune"
            )
        if self.tune < 0:
            raise OptionError(f"tune is {self.tune}, expected a number of steps, 0 for none")
        self._check_out()

    def check_disk(self, folder: Path) -> None:
        """Refuse to convert the model in `folder` where the result would not fit on the disk.

        Raises:
            CapacityError: says the needed and the free bytes.
        """
        copies = 5 if self.tune else 1  # the result, and what a tuning resumes from
        needed = copies * weight_bytes(folder, None) + _SLACK_BYTES
        free = shutil.disk_usage(self._parent).free
        if needed > free:
            raise CapacityError(
                f"converting needs {gib(needed)} of disk but {self._parent} has {gib(free)} free; "
                "make room or give --out on another disk"
            )

    def identity(self, folder: Path) -> dict[str, Any]:
        """Everything that the conversion of the model in `folder` follows from, but its tuning."""
        text = self.calibration and file_digest(self.calibration)
        identity = {"model": model_state(folder), "to": str(self.target), "text": text}
        return identity | {name: getattr(self, name) for name in ("method", "tokens", "length")}

    def call(self, source: Source) -> str:
        """The call of `convert`, for the card: files of this machine by their names alone."""
        model = source.place if source.kind == "hub" else Path(source.place).name
        options = {"calibration": self.calibration and self.calibration.name, "out": self.out.name}
        options |= {name: getattr(self, name) for name in ("method", "tokens", "length", "tune")}
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"headwise.convert({model!r}, {str(self.target)!r}, {words})"

    @property
    def _parent(self) -> Path:
        """The nearest folder above `out` that exists."""
        return next(parent for parent in self.out.parents if parent.exists())

    def _check_out(self) -> None:
        """The result is made beside `out` and then renamed, so that its parent is written."""
        out, parent = self.out, self._parent
        if out.exists() and not out.is_dir():
            raise OptionError(f"out is {out}, which is a file; give a new folder")
        if out.is_dir() and any(out.iterdir()):
            raise OptionError(f"out is {out}, which is not empty; give a new folder")
        if out.is_mount():
            raise OptionError(f"out is {out}, where a disk is mounted; give a new folder on it")
        if not (parent.is_dir() and os.access(parent, os.R_OK | os.W_OK | os.X_OK)):
            raise OptionError(
                f"out is {out}, and {parent} cannot be written; give a folder of yours"
            )
