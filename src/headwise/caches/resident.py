"""How much of what lies in files is in memory: what the caches of one model share."""

from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from headwise.base.memory import gib
from headwise.errors import CapacityError

# Layers for which files are read ahead once a page had to come from the disk.
_COLD = 1024


class Mapped(Protocol):
    """A cache whose rows lie in a mapped file."""

    def let_go(self) -> None:
        """Take the rows out of memory; they stay in the file."""


class Resident:
    """What may be in memory of caches in files: their sketches, and as many rows as fit beside.

    Layers are read in turn, so what was read last is needed last: that goes, and the layers that
    came first stay. The system may hold what went in its own cache, and gives that up as it likes.

    Args:
        limit: bytes; None leaves it to the system.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._rows = WeakKeyDictionary[Mapped, int]()  # bytes, in the order in which they came
        self._sketches = WeakKeyDictionary[Mapped, int]()
        self._faults, self._cold = _major_faults(), 0
        self._lock = Lock()  # two generations may run at once

    def __deepcopy__(self, memo: dict[int, Any]) -> "Resident":
        return self  # copies of a cache are in the same memory

    def __reduce__(self) -> tuple[Any, ...]:
        return Resident, (self.limit,)

    @property
    def reads_ahead(self) -> bool:
        """Whether rows had to come from the disk of late, so that asking for them early pays."""
        return self._cold > 0

    @property
    def words(self) -> str:
        """What it is, for a report."""
        if self.limit is None:
            return "in memory what the system has room for"
        return f"at most {gib(self.limit)} of them in memory"

    def enter(self, cache: Mapped, rows: int, sketch: int) -> None:
        """Have room for the rows of a cache, which are about to be read, and for its sketch.

        Raises:
            CapacityError: they are more than the limit; nothing has changed.
        """
        faults = _major_faults()
        self._cold = _COLD if faults > self._faults else max(0, self._cold - 1)
        self._faults = faults
        if self.limit is None:
            return
        with self._lock:
            self._count(cache, rows, sketch, self.limit)

    def _count(self, cache: Mapped, rows: int, sketch: int, limit: int) -> None:
        sketches = sum(self._sketches.values()) - self._sketches.get(cache, 0) + sketch
        if sketches + rows > limit:
            raise CapacityError(
                f"cache_limit is {limit:,} bytes, and sketches of {sketches:,} with a layer's "
                f"rows of {rows:,} do not fit: expected at least {sketches + rows:,}"
            )
        self._sketches[cache] = sketch
        self._rows[cache] = rows
        taken = sketches + sum(self._rows.values())
        for other in reversed(list(self._rows)):
            if taken <= limit:
                break
            if other is not cache:
                other.let_go()
                taken -= self._rows.pop(other)


def _major_faults() -> int:
    """Pages for which this process has waited."""
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
