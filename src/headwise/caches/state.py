"""What a layer of linear attention keeps: of fixed size, and changed by every token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.caches.protocol import check_crop, check_index, check_range
from headwise.errors import UnsupportedError


class StateCache:
    """The last inputs of one layer's convolution [B, C, W] and its state [B, H, D, V].

    It is no `Cache`: it has no rows to append to. The layer changes both tensors where they are, so
    what was taken from it changes too, and no gradient flows through them. A `copy.copy` has
    tensors of its own.

    Example:
        >>> import torch
        >>> from headwise.caches import StateCache
        >>> from headwise.nn import LinearAttention
        >>> from headwise.spec import StateSpec
        >>> spec = StateSpec(conv_channels=192, conv_width=4, heads=4, key_dim=16, value_dim=16)
        >>> layer, cache = LinearAttention(spec), StateCache()
        >>> for length in (10, 1):
        ...     with torch.no_grad():
        ...         out = layer(torch.randn(1, length, 64), cache=cache)
        ...     print(cache.length, cache.nbytes)
        10 7168
        11 7168
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.state: Tensor | None = None
        self.length = 0
        self._starts: list[int] | None = None

    def __copy__(self) -> "StateCache":
        twin = StateCache()
        twin.hold(*(None if each is None else each.clone() for each in (self.inputs, self.state)))
        twin.length, twin._starts = self.length, self._starts
        return twin

    @property
    def batch(self) -> int | None:
        """Sequences; None before any token."""
        return next((each.shape[0] for each in self._tensors()), None)

    @property
    def starts(self) -> Sequence[int] | None:
        """The next position of each sequence where they differ; None where it is `length`."""
        return self._starts

    @property
    def nbytes(self) -> int:
        """Bytes that both tensors take, whatever the number of tokens."""
        return sum(each.numel() * each.element_size() for each in self._tensors())

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated: `nbytes`."""
        return self.nbytes

    def hold(self, inputs: Tensor | None, state: Tensor | None) -> None:
        """Keep these; a layer gives back those that it has changed in their place."""
        # normal tensors even under inference mode, so that they can be changed outside it
        with torch.inference_mode(False):
            self.inputs, self.state = (
                each.clone() if each is not None and each.is_inference() else each
                for each in (inputs, state)
            )

    def count(self, tokens: int, lengths: Tensor | None = None) -> None:
        """Count `tokens` more in each sequence, or those of `lengths` [B]."""
        if lengths is None and self._starts is None:
            self.length += tokens
            return
        more = [tokens] * len(self._starts or ()) if lengths is None else lengths.tolist()
        ends = [a + b for a, b in zip(self._starts or [self.length] * len(more), more, strict=True)]
        self._count_all(ends)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, which can only be all of them.

        Raises:
            ShapeError: `length` is negative or more than is held.
            UnsupportedError: it is less: a state cannot give up a token.
        """
        check_crop(length, self.length)
        if length < self.length:
            raise UnsupportedError(
                f"crop to {length} of {self.length} tokens: a state cannot give up a token; keep a "
                "copy.copy of the cache from before, or reset it and read the tokens again"
            )

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
        """
        check_index(index)
        if self.batch is None:
            return
        check_range(index, self.batch)
        with torch.inference_mode(False), torch.no_grad():
            self.hold(
                *(
                    None if each is None else each.index_select(0, index.to(each.device))
                    for each in (self.inputs, self.state)
                )
            )
        if self._starts is not None:
            self._count_all([self._starts[at] for at in index.tolist()])

    def reorder(self, index: Tensor) -> None:
        """`select` that keeps the batch size, as beam search does at every step.

        Raises:
            ShapeError: as `select`, or `index` has another length than the batch.
        """
        check_index(index, self.batch)
        self.select(index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.inputs = self.state = self._starts = None
        self.length = 0

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        with torch.inference_mode(False):
            self.hold(
                *(None if each is None else each.to(device) for each in (self.inputs, self.state))
            )

    def _tensors(self) -> list[Tensor]:
        return [each for each in (self.inputs, self.state) if each is not None]

    def _count_all(self, ends: list[int]) -> None:
        self.length = max(ends, default=0)
        self._starts = None if len(set(ends)) < 2 else ends
