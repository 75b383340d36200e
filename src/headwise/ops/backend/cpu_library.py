"""The C++ library of the backend `cpu`: loaded at the first question, at one instruction set."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from headwise.errors import OptionError
from headwise.ops.backend.cpu_shapes import register_shapes

# The instruction sets that the kernels are built for, slowest first: the index is the level.
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
# Set to one of LEVELS, it forces a lower one than the machine has.
LEVEL_VARIABLE = "HEADWISE_CPU_LEVEL"

_FILE = "libheadwise_cpu.so"

# Why the library cannot be used, "" if it can, None before it was looked for.
_missing: str | None = None
_best = 0
_level = 0


def available() -> tuple[bool, str]:
    """Whether the library is there and loads, and why not."""
    try:
        missing = ready()
    except OptionError as error:
        return False, str(error)
    return (False, missing) if missing else (True, f"C++ kernels for {LEVELS[_level]}")


_Function = TypeVar("_Function", bound=Callable[..., object])


def _constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler for this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def ready() -> str:
    """Load the library once; "" when its operator can be called, else why not.

    Raises:
        OptionError: the environment forces a level that is unknown or higher than the machine's.
    """
    global _missing, _level
    if _missing is None:
        _missing = _load()
        if not _missing:
            try:
                _level = forced_level(os.environ.get(LEVEL_VARIABLE), _best)
            except OptionError:
                _missing = None
                raise
    return _missing


@_constant
def chosen_level() -> int:
    """Which of `LEVELS` runs."""
    return _level


def forced_level(name: str | None, best: int) -> int:
    """The level called `name`, or `best` where none is asked for.

    >>> forced_level("avx2", best=3), forced_level(None, best=3)
    (1, 3)
    """
    if not name:
        return best
    able = LEVELS[: best + 1]
    if name not in able:
        raise OptionError(
            f"{LEVEL_VARIABLE} is {name!r}, expected one of {', '.join(able)} on this machine"
        )
    return able.index(name)


def _load() -> str:
    global _best
    if not hasattr(torch.ops.headwise, "attend"):
        # an editable install has two folders: the sources, and what was built
        folders = [Path(folder) for folder in sys.modules["headwise"].__path__]
        files = [folder / _FILE for folder in folders if (folder / _FILE).is_file()]
        if not files:
            return (
                "the C++ library was not built when headwise was installed (no C++17 compiler, or "
                "it failed): reinstall with pip install -v to see why"
            )
        try:
            torch.ops.load_library(files[0])
        except OSError as error:
            return f"the C++ library does not load: {str(error).splitlines()[0]}"
        register_shapes()
    _best = torch.ops.headwise.best_level()
    return ""
