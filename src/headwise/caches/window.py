"""A cache for one layer with a sliding window: it holds what the window can still reach."""

import torch
from torch import Tensor

from headwise.caches.contiguous import ContiguousCache
from headwise.errors import ShapeError, UnsupportedError


class WindowCache:
    """Two tensors [B, heads, L, dim] side by side, of which the last `window` - 1 tokens are kept.

    Example:
        >>> import torch
        >>> from headwise.caches import WindowCache
        >>> cache = WindowCache(window=4)
        >>> key, value = cache.append(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8))
        >>> key.shape, cache.length, cache.held  # the ten tokens see one another
        (torch.Size([1, 2, 10, 8]), 10, 3)
        >>> key, value = cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> key.shape, cache.nbytes
        (torch.Size([1, 2, 4, 8]), 384)

    The tokens lie in their order in one buffer with room behind them. Where the room runs out,
    those that are still needed move to a new buffer, so an append copies a bounded number of rows
    on average, and memory is bounded whatever the length. The views stay valid until the next call.

    Args:
        window: w, tokens that a query sees, itself among them.

    Raises:
        ShapeError: `window` is below 1.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ShapeError(f"window is {window}, expected at least 1")
        self.window = window
        self.length = 0
        self._recording = False
        self._buffer = ContiguousCache()

    @property
    def recording(self) -> bool:
        """Whether every token is kept until the next `crop`, which can then take some back."""
        return self._recording

    @recording.setter
    def recording(self, recording: bool) -> None:
        if recording and not self._recording and self._passed:
            self._move()  # what is kept counts from here
        self._recording = recording

    @property
    def first(self) -> Tensor | None:
        """What is kept of the first tensor, [B, heads, held, dim]; None at first.

        While recording, all since the last `crop`.
        """
        return self._kept(self._buffer.first)

    @property
    def second(self) -> Tensor | None:
        """What is kept of the second tensor, [B, heads, held, dim]; None at first."""
        return self._kept(self._buffer.second)

    @property
    def held(self) -> int:
        """Tokens that the next one can see: at most `window` - 1."""
        return self._buffer.length - self._passed

    @property
    def nbytes(self) -> int:
        """Bytes that the kept tokens take."""
        if self._buffer.length == 0:
            return 0
        tokens = self._buffer.length if self.recording else self.held
        return self._buffer.nbytes // self._buffer.length * tokens

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated."""
        return self._buffer.reserved_bytes

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens: first [B, heads, S, dim], second [B, heads, S, dim'].

        Returns:
            Views of what these tokens may see, at most `window` - 1 before them and themselves:
            [B, heads, held + S, dim] and [B, heads, held + S, dim'].

        Raises:
            ShapeError: the tokens do not fit what the cache holds.
            UnsupportedError: the tokens need gradients.
            CapacityError: a buffer cannot be allocated; the cache is unchanged.
        """
        passed = self._passed
        held, also = self._buffer.append(first, second)
        self.length += first.shape[2]
        # what is handed out lives on in the old buffer, a long prompt's too
        full = self._buffer.length >= min(self._buffer.capacity, 3 * self.window)
        if self._passed and full and not self.recording:
            self._move()
        return held[:, :, passed:], also[:, :, passed:]

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, and of those what the window reaches.

        Raises:
            ShapeError: `length` is negative or more than was appended.
            UnsupportedError: tokens that the window would reach then are gone; set `recording`
                before the appends that may have to be taken back.
        """
        if not isinstance(length, int) or not 0 <= length <= self.length:
            raise ShapeError(f"crop to {length!r} tokens, expected 0 to {self.length}, those seen")
        taken = self.length - length
        outgrown = self.length >= self.window and not self.recording
        left = self._buffer.length - taken
        if taken and (outgrown or left < min(length, self.window - 1)):
            raise UnsupportedError(
                f"crop from {self.length} to {length} tokens: what a window of {self.window} "
                "reached there is gone; set recording=True before appending what may be taken back"
            )
        self._buffer.crop(left)
        self.length = length
        if self._passed:
            self._move()

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: the new buffers cannot be allocated; the cache is unchanged.
        """
        self._buffer.select(index)

    def reorder(self, index: Tensor) -> None:
        """`select` that keeps the batch size, as beam search does at every step.

        Raises:
            ShapeError: as `select`, or `index` has another length than the batch.
        """
        self._buffer.reorder(index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._buffer.reset()
        self.length = 0

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        self._buffer.to(device)

    @property
    def _passed(self) -> int:
        """Tokens at the front of the buffer that the window has passed."""
        return max(0, self._buffer.length - (self.window - 1))

    def _kept(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or self._recording:
            return tensor
        return tensor[:, :, self._passed :]

    def _move(self) -> None:
        """What the window reaches, into a new buffer."""
        first, second, passed = self._buffer.first, self._buffer.second, self._passed
        assert first is not None
        assert second is not None
        moved = ContiguousCache()
        with torch.no_grad():
            moved.append(first[:, :, passed:], second[:, :, passed:])
        self._buffer = moved
