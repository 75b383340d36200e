"""Which pages of a pool belong to which sequence: tables, lengths and users, and no memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.caches.holders import others_hold
from headwise.caches.protocol import check_crop
from headwise.errors import ShapeError


@dataclass(slots=True, eq=False)
class Step:
    """What tokens that are to be appended need, one number for each sequence but in `copied`.

    before, added: tokens held, and tokens to come. new: pages to take. copied: the sequences whose
    last page has other users that are to keep it as it is.
    """

    before: list[int]
    added: list[int]
    new: list[int]
    copied: list[int]

    @property
    def pages(self) -> int:
        """Pages to take in all."""
        return len(self.copied) + sum(self.new)


class Pages:
    """The pages of every sequence, in its order, and how many sequences use each page.

    Args:
        size: tokens of a page, a power of two.

    Attributes:
        table: [B, n] int32, the pages of each sequence; behind its last page anything.
        lengths: tokens of each sequence.
        users: of each page.
        free: pages without users, the next to take last.
        dropped: whether views may reach rows that no sequence holds.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def __copy__(self) -> "Pages":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.table = self.table.clone()
        twin.lengths, twin.users, twin.free = self.lengths[:], self.users[:], self.free[:]
        return twin

    def clear(self) -> None:
        """Forget all pages."""
        self.table = torch.empty(0, 0, dtype=torch.int32)
        self.lengths: list[int] = []
        self.users: list[int] = []
        self.free: list[int] = []
        self.dropped = False
        self._shared = False  # whether some last page may have other users

    def cut(self) -> int:
        """Forget the free pages behind the last one that is used; how many are left."""
        count = max((page + 1 for page, users in enumerate(self.users) if users), default=0)
        self.users = self.users[:count]
        self.free = [page for page in self.free if page < count]
        return count

    def has_room(self, count: int) -> bool:
        """Whether the only sequence's last page is its own, and has room for so many tokens."""
        if len(self.lengths) != 1 or self.dropped or self._shared:
            return False
        held = self.lengths[0] % self.size
        return 0 < held <= self.size - count

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def used(self) -> int:
        """Pages that sequences use."""
        return len(self.users) - len(self.free)

    @property
    def tokens(self) -> int:
        """Tokens held, those that sequences share once."""
        held: dict[int, int] = {}
        for row, length in zip(self.table.tolist(), self.lengths, strict=True):
            for index in range(self.of(length)):
                inside = min(self.size, length - index * self.size)
                held[row[index]] = max(inside, held.get(row[index], 0))
        return sum(held.values())

    def of(self, length: int) -> int:
        """Pages that so many tokens take."""
        return -(-length // self.size)

    def add(self, count: int) -> None:
        """Know of `count` pages more, which nobody uses; they are taken after those free now."""
        pages = len(self.users)
        self.users += [0] * count
        self.free = [*range(pages + count - 1, pages - 1, -1), *self.free]

    def use(self, table: Tensor, lengths: list[int]) -> None:
        """Take these pages, count their users, and free the rest."""
        index = torch.arange(table.shape[1], device=table.device)
        used = torch.tensor([self.of(length) for length in lengths], device=table.device)
        pages = table[index < used[:, None]]
        users = torch.bincount(pages, minlength=len(self.users))
        self.table, self.lengths = table, lengths
        self.dropped = True
        self.users = users.tolist()
        self.free = (users == 0).nonzero().flatten().flip(0).tolist()
        self._shared = bool((users > 1).any())

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence."""
        check_crop(length, self.length)
        self.use(self.table, [min(length, old) for old in self.lengths])

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was; those named twice share their pages."""
        chosen = index.tolist()
        if any(not 0 <= sequence < len(self.lengths) for sequence in chosen):
            raise ShapeError(
                f"index runs from {min(chosen)} to {max(chosen)}, expected 0 to "
                f"{len(self.lengths) - 1}, those held"
            )
        table = self.table.index_select(0, index.to(self.table.device))
        self.use(table, [self.lengths[sequence] for sequence in chosen])

    def share(self, source: int, length: int, targets: Sequence[int]) -> None:
        """Make the sequences `targets` hold the first tokens of `source` alone."""
        batch = len(self.lengths)
        if any(not 0 <= sequence < batch for sequence in (source, *targets)):
            raise ShapeError(
                f"share from {source} to {list(targets)}: sequences are 0 to {batch - 1}"
            )
        if not 0 <= length <= self.lengths[source]:
            raise ShapeError(
                f"share {length} tokens of sequence {source}, which has {self.lengths[source]}"
            )
        table, lengths = self.table.clone(), list(self.lengths)
        others = [sequence for sequence in targets if sequence != source]
        table[others] = self.table[source]
        for sequence in others:
            lengths[sequence] = length
        self.use(table, lengths)

    def step(self, added: list[int]) -> Step:
        """What so many tokens for each sequence need; nothing is taken."""
        before = self.lengths or [0] * len(added)
        new = [self.of(old + count) - self.of(old) for old, count in zip(before, added)]
        return Step(before, added, new, self._copied(before, added) if self._shared else [])

    def take(self, step: Step, device: torch.device) -> list[tuple[int, int, int]]:
        """Take the pages of a step; the copies to make: from page, to page, and how many rows."""
        self.lengths = [old + count for old, count in zip(step.before, step.added, strict=True)]
        self._make_table(device, writes=step.pages > 0)
        copies = []
        for sequence in step.copied:
            index, rows = divmod(step.before[sequence], self.size)
            page, fresh = int(self.table[sequence, index]), self._take()
            self.users[page] -= 1
            self.table[sequence, index] = fresh
            copies.append((page, fresh, rows))
        for sequence, pages in enumerate(step.new):
            if pages:
                begin = self.of(step.before[sequence])
                taken = torch.tensor([self._take() for _ in range(pages)])
                self.table[sequence, begin : begin + pages] = taken
        return copies

    def places(self, step: Step, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where tokens [B, S] of a step lie: their pages and rows, [n].

        The third says which of them are real, [B, S]: the last ones of each sequence, as many as
        are added; None where all are.
        """
        device = self.table.device
        position = torch.tensor(step.before, device=device)[:, None]
        position = position + torch.arange(length, device=device)
        real = None
        if min(step.added) < length:
            padding = length - torch.tensor(step.added, device=device)[:, None]
            real = torch.arange(length, device=device) >= padding
            position = (position - padding).clamp(min=0)
        pages, rows = self.table.gather(1, position // self.size).long(), position % self.size
        return (
            (pages.flatten(), rows.flatten(), None)
            if real is None
            else (
                pages[real],
                rows[real],
                real,
            )
        )

    def _copied(self, before: list[int], added: list[int]) -> list[int]:
        """The sequences whose last page gets tokens and has other users that are to keep it."""
        left: dict[int, int] = {}
        sequences = []
        for sequence, (length, count) in enumerate(zip(before, added, strict=True)):
            if count and length % self.size:
                page = int(self.table[sequence, length // self.size])
                users = left.get(page, self.users[page])
                if users > 1:
                    sequences.append(sequence)
                    left[page] = users - 1
        return sequences

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _make_table(self, device: torch.device, *, writes: bool) -> None:
        """Have room in the table for what `lengths` says, and nobody else who sees it written."""
        pages, (rows, width) = self.of(self.length), self.table.shape
        if pages > width:
            width = max(pages, width + width // 2, 8)
        elif rows == len(self.lengths) and not (writes and others_hold(self.table)):
            return
        # normal tensors even under inference mode, so that appends go on working outside it
        with torch.inference_mode(False):
            table = torch.zeros(len(self.lengths), width, dtype=torch.int32, device=device)
            table[:rows, : self.table.shape[1]] = self.table
        self.table = table


def size_obstacle(size: int) -> str | None:
    """Why pages cannot hold so many tokens; None if they can."""
    whole = size >= 1 and not size & (size - 1)
    return None if whole else ": pages hold a power of two of tokens, as 16 or 64"
