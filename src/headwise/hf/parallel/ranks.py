"""The processes that share a context, a group of torch.distributed, and what they send."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headwise.caches import CacheChoice, Share, SplitCache, split
from headwise.errors import OptionError, RankError


@dataclass(frozen=True)
class Ranks:
    """A group, and this process in it. A copy is the same group; it does not pickle."""

    group: Any
    rank: int
    count: int

    @classmethod
    def of(cls, given: Any) -> "Ranks":
        """Of a process group, or a device mesh of one dim.

        Raises:
            OptionError: neither, or one without this process.
        """
        group = given
        if hasattr(given, "get_group") and hasattr(given, "ndim"):
            if given.ndim != 1:
                raise OptionError(
                    f"context_parallel is a mesh of {given.ndim} dims: give the one that splits "
                    "contexts, as mesh['context']"
                )
            group = given.get_group()
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise OptionError(
                f"context_parallel is a {type(given).__name__}, expected a DeviceMesh or a "
                "ProcessGroup: call torch.distributed.init_process_group in processes that "
                "torchrun has started, and give torch.distributed.group.WORLD"
            )
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, tensor: Tensor) -> Tensor:
        """[N, ...], the tensors of all ranks, which are of one shape."""
        every = tensor.new_empty(self.count, *tensor.shape)
        parts = list(every.view(torch.uint8).unbind(0))  # bytes: not every group has every dtype
        own = tensor.contiguous().view(torch.uint8)
        self._together(lambda: dist.all_gather(parts, own, group=self.group))
        return every

    def broadcast(self, tensor: Tensor) -> Tensor:
        """That of the first rank, on every rank."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        whole = tensor.view(torch.uint8)
        self._together(lambda: dist.broadcast(whole, group=self.group, group_src=0))
        return tensor

    def _together(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except RuntimeError as error:
            # without the place in the source that it begins with, and what it advises
            reason = re.sub(r"^\[[^]]*\] *", "", str(error)).partition("\n")[0].partition(". ")[0]
            raise RankError(
                f"rank {self.rank} of {self.count} waited for the others of its context in vain: "
                f"one has ended, or stalls ({reason})"
            ) from error

    def differing(self, what: dict[str, int], device: torch.device) -> dict[str, int]:
        """Of numbers of up to 63 bits those that are not the first rank's, and the rank of one."""
        numbers = self.gather(torch.tensor(list(what.values()), device=device)).tolist()
        return {
            name: rank
            for rank, those in enumerate(numbers)
            for name, own, first in zip(what, those, numbers[0], strict=True)
            if own != first
        }

    def require_alike(self, differing: dict[str, int]) -> None:
        """Raise `RankError` where anything of the call differs, on every rank."""
        if differing:
            name, rank = next(iter(differing.items()))
            raise RankError(
                f"{name} of rank {rank} differ from those of rank 0: give every rank of a context "
                "the same"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self) -> Any:
        raise RankError(
            "a group of processes cannot be pickled: call headwise.detach(model) first, and attach "
            "again where it is unpickled"
        )


class RankCache(SplitCache):
    """What one of the ranks holds of a layer."""

    def __init__(self, own: Any, ranks: Ranks) -> None:
        super().__init__(own, Share(ranks.rank, ranks.count, split.BLOCK))
        self.ranks = ranks


@dataclass(frozen=True)
class SplitChoice(CacheChoice):
    """A cache that is spread over ranks."""

    ranks: Any = None

    @classmethod
    def over(cls, choice: CacheChoice, ranks: Ranks) -> "SplitChoice":
        """The same cache, spread.

        Raises:
            OptionError: one that drops tokens, or lies on disk.
        """
        if choice.folder:
            raise OptionError(
                f"cache is {str(choice)!r}, and what is spread over ranks is in memory: leave "
                "context_parallel out, or take another cache"
            )
        if choice.make().gives == "part":
            raise OptionError(
                f"cache is {str(choice)!r}, which drops tokens, so that there is nothing to spread "
                "over ranks: leave context_parallel out, or take another cache"
            )
        return cls(choice.kind, choice.size, choice.sinks, ranks=ranks)

    @property
    def words(self) -> str:
        """What it is, for a report."""
        return (
            f"{super().words}, of which this is rank {self.ranks.rank} of {self.ranks.count}, in "
            f"blocks of {split.BLOCK} tokens"
        )

    def make(self) -> RankCache:
        """An empty cache of this rank."""
        return RankCache(super().make(), self.ranks)

    def __str__(self) -> str:
        return super().__str__()
