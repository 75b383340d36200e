"""Chosen keys where a module hands its attention function a mask."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from headwise.ops import Options, chosen_mask


class ChosenMask(Tensor):
    """A boolean mask [B,1,S,L] with no memory of its own: True at the keys that were chosen.

    chosen: int32 [B,S,T], -1 is none: keys, or blocks of `block_size` of them. rest: a mask
    [B|1,1,S,L] beside it, which `&` puts there.
    Our attention function takes both out. Whatever else computes with the mask gets the booleans.
    """

    chosen: Tensor
    block_size: int | None
    rest: Tensor | None

    @staticmethod
    def __new__(
        cls,
        chosen: Tensor,
        context: int,
        block_size: int | None = None,
        rest: Tensor | None = None,
    ) -> "ChosenMask":
        batch, length, _ = chosen.shape
        size = (batch, 1, length, context)
        mask: ChosenMask = Tensor._make_wrapper_subclass(
            cls, size, dtype=torch.bool, device=chosen.device
        )
        mask.chosen, mask.block_size, mask.rest = chosen, block_size, rest
        return mask

    def write_to(self, options: Options) -> None:
        """Write what was chosen into the options of a call."""
        chosen, options.block_size = self.chosen.unsqueeze(1), self.block_size
        if self.block_size is None:
            options.indices = chosen
        else:
            options.block_indices = chosen

    def leaves_rows_empty(self) -> bool:
        """Whether some query has no key; one of padding, then."""
        return bool((self.chosen < 0).all(dim=-1).any())

    def dense(self) -> Tensor:
        """A plain tensor [B,1,S,L]."""
        options = Options(scale=1.0)
        self.write_to(options)
        mask = chosen_mask(options, 1, self.shape[3])
        assert mask is not None
        return mask if self.rest is None else mask & self.rest

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.bitwise_and.Tensor:
            own, other = args if isinstance(args[0], cls) else args[::-1]
            plain = type(other) is Tensor and other.dtype == torch.bool and other.ndim == 4
            if plain and other.shape[1:] == own.shape[1:] and other.shape[0] in (1, own.shape[0]):
                rest = other if own.rest is None else other & own.rest
                return cls(own.chosen, own.shape[3], own.block_size, rest)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, of {self.chosen.shape[2]} chosen)"
