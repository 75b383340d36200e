"""Which cache to use, by a short name: "contiguous", "paged:64", "int8:64", "disk:FOLDER"."""

import re
from dataclasses import dataclass, field

from headwise.caches import contiguous, disk, paged, quantized, window
from headwise.caches.protocol import Cache, CacheKind
from headwise.caches.resident import Resident
from headwise.errors import OptionError

_DECLARED = (
    contiguous.KIND,
    paged.KIND,
    quantized.INT8,
    quantized.INT4,
    window.KIND,
    disk.KIND,
)
KINDS = {kind.name: kind for kind in _DECLARED}
_FORMS = ", ".join(form for kind in KINDS.values() for form in kind.forms)
_EXPECTED = " or ".join(_FORMS.rsplit(", ", 1))


@dataclass(frozen=True)
class CacheChoice:
    """One of the caches and its options; `str` gives the name that `parse` reads.

    >>> CacheChoice.parse("paged")
    CacheChoice(kind='paged', size=64, sinks=0, folder='', limit=None)
    >>> str(CacheChoice.parse("window:2048,sinks=4"))
    'window:2048,sinks=4'
    """

    kind: str = "contiguous"
    size: int = 0  # of a page, or of the window
    sinks: int = 0
    folder: str = ""
    limit: int | None = None  # bytes of what lies in the folder that may be in memory
    # which the caches that are made share
    resident: Resident | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, limit: int | None = None) -> "CacheChoice":
        """Read a name; `limit`: bytes of a cache in a folder that may be in memory.

        Raises:
            OptionError: says what is expected.
        """
        if not isinstance(text, str):
            raise OptionError(f"cache is a {type(text).__name__}, expected a name: {_EXPECTED}")
        head, _, folder = text.partition(":")
        if head in KINDS and KINDS[head].in_folder and folder:
            return cls(head, folder=folder, limit=limit, resident=Resident(limit))
        if limit is not None:
            raise OptionError(
                f"cache_limit is for a cache in a folder, and cache is {text!r}: expected "
                "cache='disk:FOLDER', or no limit"
            )
        name, size, sinks = _read(text)
        kind = KINDS.get(name)
        if kind is None or _form(text) not in map(_form, kind.forms):
            raise OptionError(f"cache is {text!r}, expected one of {_EXPECTED}")
        obstacle = None if size is None else kind.obstacle(int(size))
        if obstacle is not None:
            raise OptionError(f"cache is {text!r}{obstacle}")
        return cls(name, int(size or kind.size), int(sinks or 0))

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
        return self.declared.words(self)

    @staticmethod
    def layout(name: str) -> str:
        """How a `Problem` names what the cache of this name gives; "dense" for any other."""
        kind, size, _ = _read(name)
        kind = kind or name.partition(":")[0]
        return KINDS[kind].layout(int(size or 0)) if kind in KINDS else "dense"

    def make(self) -> Cache:
        """An empty cache of this kind."""
        return self.declared.make(self)

    def __str__(self) -> str:
        if self.folder:
            return f"{self.kind}:{self.folder}"
        name = f"{self.kind}:{self.size}" if self.size else self.kind
        return f"{name},sinks={self.sinks}" if self.sinks else name


def _read(text: str) -> tuple[str, str | None, str | None]:
    """The kind, the size and the sinks of a name; no kind where it is none."""
    match = re.fullmatch(r"(\w+)(?::(\d+)(?:,sinks=(\d+))?)?", text, re.ASCII)
    return (match[1], match[2], match[3]) if match else ("", None, None)


def _form(text: str) -> str:
    """A name, or one of the forms that people may write, without its numbers.

    >>> _form("window:2048,sinks=4") == _form("window:W,sinks=S") == "window:,sinks="
    True
    """
    return re.sub(r"(?<=[:=])\w+", "", text)
