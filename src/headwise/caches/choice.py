"""Which cache to use, by a short name: "contiguous", "paged:64", "int8", "window:2048,sinks=4"."""

import re
from dataclasses import dataclass

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.paged import PagedCache
from headwise.caches.quantized import QuantizedCache
from headwise.caches.window import WindowCache
from headwise.errors import OptionError

Cache = ContiguousCache | PagedCache | QuantizedCache | WindowCache

_PAGE_SIZE = 64
_FORMS = "contiguous, paged, paged:PAGE_SIZE, int8, int4, window:W or window:W,sinks=S"


@dataclass(frozen=True)
class CacheChoice:
    """One of the caches and its options; `str` gives the name that `parse` reads.

    >>> CacheChoice.parse("paged")
    CacheChoice(kind='paged', size=64, sinks=0)
    >>> str(CacheChoice.parse("window:2048,sinks=4"))
    'window:2048,sinks=4'
    """

    kind: str = "contiguous"
    size: int = 0  # of a page, or of the window
    sinks: int = 0

    @classmethod
    def parse(cls, text: str) -> "CacheChoice":
        """Read a name.

        Raises:
            OptionError: says what is expected.
        """
        if not isinstance(text, str):
            raise OptionError(f"cache is a {type(text).__name__}, expected a name: {_FORMS}")
        found = re.fullmatch(
            r"(contiguous|int8|int4|paged|window)(?::(\d+)(?:,sinks=(\d+))?)?", text
        )
        kind, size, sinks = found.groups() if found else ("", None, None)
        whole = kind == "paged" or (size is None) != (kind == "window")
        if not kind or not whole or (sinks is not None and kind != "window"):
            raise OptionError(f"cache is {text!r}, expected one of {_FORMS}")
        choice = cls(kind, int(size or (_PAGE_SIZE if kind == "paged" else 0)), int(sinks or 0))
        if kind == "paged" and (choice.size < 1 or choice.size & (choice.size - 1)):
            raise OptionError(
                f"cache is {text!r}: pages hold a power of two of tokens, as paged:16"
            )
        if kind == "window" and not 1 <= choice.size < 2**31:
            raise OptionError(f"cache is {text!r}, expected a window of 1 to 2**31 - 1 tokens")
        return choice

    @property
    def words(self) -> str:
        """What it is, for a report.

        >>> CacheChoice.parse("paged:16").words
        'paged, 16 tokens a page'
        """
        if self.kind == "paged":
            return f"paged, {self.size} tokens a page"
        if self.kind == "window":
            sinks = f" and the first {self.sinks}" if self.sinks else ""
            return f"the last {self.size} tokens{sinks}"
        return {
            "int8": "int8, a scale a row",
            "int4": "int4, rotated, a scale for 32 elements",
        }.get(self.kind, "contiguous, grown in place")

    def make(self) -> Cache:
        """An empty cache of this kind."""
        if self.kind == "paged":
            return PagedCache(self.size)
        if self.kind == "window":
            return WindowCache(self.size, self.sinks)
        if self.kind in ("int8", "int4"):
            return QuantizedCache(8 if self.kind == "int8" else 4)
        return ContiguousCache()

    def __str__(self) -> str:
        name = f"{self.kind}:{self.size}" if self.size else self.kind
        return f"{name},sinks={self.sinks}" if self.sinks else name
