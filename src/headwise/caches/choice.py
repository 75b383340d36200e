"""Which cache to use, by a short name: "contiguous", "paged:64", "int8", "window:2048,sinks=4"."""

import re
from dataclasses import dataclass

from headwise.caches import contiguous, paged, quantized, window
from headwise.caches.protocol import Cache, CacheKind
from headwise.errors import OptionError

_DECLARED = (
    contiguous.KIND,
    paged.KIND,
    quantized.INT8,
    quantized.INT4,
    window.KIND,
)
KINDS = {kind.name: kind for kind in _DECLARED}
_FORMS = ", ".join(form for kind in KINDS.values() for form in kind.forms)
_EXPECTED = " or ".join(_FORMS.rsplit(", ", 1))


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
            raise OptionError(f"cache is a {type(text).__name__}, expected a name: {_EXPECTED}")
        match = re.fullmatch(r"(\w+)(?::(\d+)(?:,sinks=(\d+))?)?", text, re.ASCII)
        name, size, sinks = match.groups() if match else ("", None, None)
        kind = KINDS.get(name)
        # a size is given where the kind has none to fall back on, and only where it takes one
        whole = kind is not None and (kind.size is not None if size is None else kind.size != 0)
        if kind is None or not whole or (sinks is not None and not kind.takes_sinks):
            raise OptionError(f"cache is {text!r}, expected one of {_EXPECTED}")
        choice = cls(name, int(size or kind.size or 0), int(sinks or 0))
        obstacle = kind.obstacle(choice.size)
        if obstacle is not None:
            raise OptionError(f"cache is {text!r}{obstacle}")
        return choice

    @property
    def declared(self) -> CacheKind:
        """The kind, as its file declares it."""
        return KINDS[self.kind]

    @property
    def words(self) -> str:
        """What it is, for a report.

        >>> CacheChoice.parse("paged:16").words
        'paged, 16 tokens per page'
        """
        return self.declared.words(self.size, self.sinks)

    @staticmethod
    def layout(name: str) -> str:
        """How a `Problem` names what the cache of this name gives; "dense" for any other."""
        kind = KINDS.get(name.partition(":")[0])
        return "dense" if kind is None else kind.layout

    def make(self) -> Cache:
        """An empty cache of this kind."""
        return self.declared.make(self.size, self.sinks)

    def __str__(self) -> str:
        name = f"{self.kind}:{self.size}" if self.size else self.kind
        return f"{name},sinks={self.sinks}" if self.sinks else name
