"""What every cache is, and how a kind of cache is declared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headwise.errors import ShapeError, UnsupportedError
from headwise.ops import KV, Bits

# What `append` returns: all rows, a view of all, those rows alone that the new tokens may see, or
# those that one of several processes has.
Gives = Literal["rows", "view", "part", "split"]


class Cache(ABC):
    """Keys and values of one layer, or MLA's latents and rope keys: memory and positions.

    Two tensors [B, heads, L, dim] side by side. What it hands out never changes: rows that somebody
    still holds are not written over. A `copy.copy` shares memory until either of the two appends.
    Appends are in place, so no gradient flows through them.
    """

    gives: ClassVar[Gives] = "rows"
    window: int | None = None
    sinks: int = 0
    length: Any  # tokens seen, of the longest sequence

    @property
    @abstractmethod
    def name(self) -> str:
        """How `CacheChoice.parse` reads it, as "paged:64"."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the held tokens take."""

    @property
    @abstractmethod
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""

    @property
    def held(self) -> int:
        """Tokens that the next one can see: all."""
        return self.length

    @property
    @abstractmethod
    def batch(self) -> int | None:
        """Sequences; None before any append."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of what `rows` gives; none where it does not hold every token."""
        return ()

    @property
    def starts(self) -> Sequence[int] | None:
        """The next position of each sequence where they differ; None where it is `length`."""
        return None

    @abstractmethod
    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | KV:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim']."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: new buffers cannot be allocated; the cache is unchanged.
        """

    def rows(self, sequence: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """Tokens `begin` to `end` of a sequence as they are held, under the names `kept`.

        Each is [heads, end - begin, dim], and a view where that can be.

        Raises:
            UnsupportedError: a cache that does not hold every token.
        """
        raise UnsupportedError(f"a cache of kind {self.name} does not hold every token")

    def read_ahead(self, indices: Tensor | None = None) -> None:  # noqa: B027 - most hold all
        """Be told which tokens are about to be read: indices int32 [B, K, S, T], -1 for none.

        None stands for all. What comes from a disk can be asked for early.
        """

    def reorder(self, index: Tensor) -> None:
        """`select` that keeps the batch size, as beam search does at every step.

        Raises:
            ShapeError: as `select`, or `index` has another length than the batch.
            CapacityError: as `select`.
        """
        check_index(index, self.batch)
        self.select(index)

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and release the memory."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""


@dataclass(frozen=True)
class CacheKind:
    """One kind of cache, as it is asked for by name: `name`, `name:SIZE`, `name:SIZE,sinks=S`.

    Or `name:FOLDER`, where it lies in a folder.

    Args:
        name: of the kind.
        forms: what people may write, as "window:W,sinks=S"; what none of them has cannot be given.
        make: an empty cache, of a `CacheChoice`.
        words: what it is, for a report, of a `CacheChoice`.
        size: where none is given.
        obstacle: why it cannot be of the size that is given; None if it can.
        layout: of what it gives at a size, as a `Problem` names it.
        bits: of the integers that rows are rounded to; None where they keep their dtype.
        in_folder: whether a folder is given for the size.
    """

    name: str
    forms: tuple[str, ...]
    make: Callable[[Any], Cache]
    words: Callable[[Any], str]
    size: int = 0
    obstacle: Callable[[int], str | None] = lambda size: None
    layout: Callable[[int], str] = lambda size: "dense"
    bits: Bits | None = None
    in_folder: bool = False


def check_index(index: Tensor, batch: int | None = None) -> None:
    """Raise `ShapeError` unless `index` is [B'] of integers, one for each of `batch` if given."""
    if not isinstance(index, Tensor):
        raise ShapeError(f"index is a {type(index).__name__}, expected a tensor [B'] of integers")
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"index has shape {list(index.shape)} and dtype {index.dtype}, expected [B'] of int32 "
            "or int64"
        )
    if batch is not None and len(index) != batch:
        raise ShapeError(
            f"index has shape {list(index.shape)}, expected [{batch}], one per sequence held"
        )


def check_range(index: Tensor, batch: int) -> None:
    """Raise `ShapeError` unless `index` names sequences of `batch`; told on the CPU alone."""
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= batch:
            raise ShapeError(
                f"index runs from {low} to {high}, expected 0 to {batch - 1}, those held"
            )


def check_crop(length: Any, most: int) -> None:
    """Raise `ShapeError` unless `length` is an int of 0 to `most`."""
    if not isinstance(length, int) or not 0 <= length <= most:
        raise ShapeError(f"crop to {length!r} tokens, expected 0 to {most}, those held")


def check_pair(first: Tensor, second: Tensor) -> None:
    """Raise unless both are tokens of the same sequences, [B, heads, S, dim], without gradients."""
    for name, tokens in (("first", first), ("second", second)):
        if not isinstance(tokens, Tensor):
            raise ShapeError(f"{name} is a {type(tokens).__name__}, expected a tensor")
        if tokens.ndim != 4:
            raise ShapeError(f"{name} has shape {list(tokens.shape)}, expected [B, heads, S, dim]")
        if tokens.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{name} needs gradients, and a cache appends in place: use torch.no_grad(), or "
                "train without a cache"
            )
    if first.shape[:3] != second.shape[:3] or first.device != second.device:
        raise ShapeError(
            f"first has shape {list(first.shape)} on {first.device} and second "
            f"{list(second.shape)} on {second.device}: B, heads, S and device must agree"
        )
