"""A cache for one layer with a sliding window: it holds what the window can still reach.

With sinks it also holds the first tokens, which a model that was not trained with a window needs to
go on making sense (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from headwise.caches.contiguous import ContiguousCache
from headwise.caches.protocol import Cache, CacheKind
from headwise.errors import ShapeError, UnsupportedError


class WindowCache(Cache):
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
    on average, and memory is bounded whatever the length. The views that it hands out never change:
    where somebody still holds rows that would be written over, those that are needed move at once.
    A `copy.copy` shares memory until either of the two appends.

    Tokens keep the positions that they had; what lies between the sinks and the window is as if it
    were masked. `mask` says so for more than one new token.

    Args:
        window: w, tokens that a query sees, itself among them.
        sinks: s, tokens at the beginning that every query sees as well.

    Raises:
        ShapeError: `window` is below 1, or `sinks` below 0.
    """

    gives = "part"

    def __init__(self, window: int, sinks: int = 0) -> None:
        if window < 1:
            raise ShapeError(f"window is {window}, expected at least 1")
        if sinks < 0:
            raise ShapeError(f"sinks is {sinks}, expected 0 or more")
        self.window: int = window
        self.sinks = sinks
        self.length = 0
        self._recording = False
        self._buffer = ContiguousCache()
        self._lead = 0  # rows at the front of the buffer that are the sinks, moved there
        self._sinks: tuple[Tensor, Tensor] | None = None

    def __copy__(self) -> "WindowCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._buffer = copy(self._buffer)
        return twin

    @property
    def recording(self) -> bool:
        """Whether every token is kept until the next `crop`, which can then take some back."""
        return self._recording

    @recording.setter
    def recording(self, recording: bool) -> None:
        if recording and not self._recording and self._passed:
            self._move()  # what is kept counts from here, and the sinks' places are their own
        self._recording = recording

    @property
    def first(self) -> Tensor | None:
        """What is kept of the first tensor, [B, heads, held, dim]; None at first.

        While recording, all since the last `crop`.
        """
        return self._kept(self._buffer.first, 0)

    @property
    def second(self) -> Tensor | None:
        """What is kept of the second tensor, [B, heads, held, dim]; None at first."""
        return self._kept(self._buffer.second, 1)

    @property
    def name(self) -> str:
        """As "window:2048,sinks=4"."""
        name = f"{KIND.name}:{self.window}"
        return f"{name},sinks={self.sinks}" if self.sinks else name

    @property
    def batch(self) -> int | None:
        """Sequences; None before any append."""
        return self._buffer.batch

    @property
    def held(self) -> int:
        """Tokens that the next one can see: at most `sinks` + `window` - 1."""
        return min(self.length, self.sinks + self.window - 1)

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
            Views of what these tokens may see, the sinks, at most `window` - 1 tokens before them,
            and themselves: [B, heads, held + S, dim] and [B, heads, held + S, dim'].

        Raises:
            ShapeError: the tokens do not fit what the cache holds.
            UnsupportedError: the tokens need gradients.
            CapacityError: a buffer cannot be allocated; the cache is unchanged.
        """
        led = self._sinks is not None and self._passed > 0 and not self._recording
        if led:
            self._lead_with_sinks()
        passed = self._passed
        keys, values = self._buffer.append(first, second)
        self.length += first.shape[2]
        self._keep_sinks(keys, values)
        if led:
            views = keys[:, :, passed:], values[:, :, passed:]
        else:
            views = self._from(keys, passed, 0), self._from(values, passed, 1)
        # what is handed out lives on in the old buffer, a long prompt's too
        full = self._buffer.length >= min(self._buffer.capacity, 3 * self.window + self.sinks)
        if self._passed and full and not self.recording:
            self._move()
        return views

    def mask(self, query_length: int) -> Tensor | None:
        """What each of the last S tokens sees of the keys that their `append` returned.

        Returns:
            Boolean [1, 1, S, L], True = attend; None for one token, which sees them all.
        """
        if query_length <= 1 or self._buffer.first is None:
            return None
        key = self.columns(query_length)
        query = torch.arange(self.length - query_length, self.length, device=key.device)[:, None]
        visible = (key <= query) & ((key > query - self.window) | (key < self.sinks))
        return visible[None, None]

    def columns(self, query_length: int) -> Tensor:
        """The positions [L] of the keys that the `append` of the last S tokens returned."""
        device = None if self._buffer.first is None else self._buffer.first.device
        before = self.length - query_length
        sinks = min(self.sinks, before)
        recent = max(sinks, before - self.window + 1)
        every = torch.arange(self.length, device=device)
        return torch.cat([every[:sinks], every[recent:]])

    def hold(self, first: Tensor, second: Tensor, length: int) -> None:
        """Hold what `first` and `second` of a cache like this one were after `length` tokens.

        Raises:
            ShapeError: they are not as many as such a cache holds.
        """
        held = min(length, self.sinks + self.window - 1)
        if first.shape[2] != held:
            raise ShapeError(
                f"first has {first.shape[2]} tokens, expected {held}, what {self.name} holds of "
                f"{length}"
            )
        self.reset()
        self._buffer.append(first, second)
        self._keep_sinks(first, second)
        self.length, self._lead = length, self.sinks if held < length else 0

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
        outgrown = self.length >= self.window + self.sinks and not self.recording
        left = self._buffer.length - taken
        if taken and (outgrown or left - self._lead < min(length - self._lead, self.window - 1)):
            raise UnsupportedError(
                f"crop from {self.length} to {length} tokens: what a window of {self.window} "
                "reached there is gone; set recording=True before appending what may be taken back"
            )
        self._buffer.crop(left)
        self.length = length
        if length < self.sinks:
            self._lead, self._sinks = 0, None
        if self._passed:
            self._move()

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: index [B'] int, any order, repeats allowed.

        Raises:
            ShapeError: `index` is not 1-d or names a sequence that is not held.
            CapacityError: the new buffers cannot be allocated; the cache is unchanged.
        """
        self._buffer.select(index)
        if self._sinks is not None:
            first, second = (t.index_select(0, index.to(t.device)) for t in self._sinks)
            self._sinks = first, second

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.length = 0
        self._recording = False
        self._buffer = ContiguousCache()
        self._lead, self._sinks = 0, None

    def to(self, device: torch.device | str) -> None:
        """Move what is held to `device`."""
        self._buffer.to(device)
        if self._sinks is not None:
            self._sinks = self._sinks[0].to(device), self._sinks[1].to(device)

    @property
    def _passed(self) -> int:
        """Tokens in the buffer that are neither sinks nor in the window of the next token."""
        return max(0, self._buffer.length - self.sinks - (self.window - 1))

    def _kept(self, tensor: Tensor | None, which: int) -> Tensor | None:
        if tensor is None or self._recording:
            return tensor
        return self._from(tensor, self._passed, which)

    def _from(self, rows: Tensor, passed: int, which: int) -> Tensor:
        """The rows of the buffer without those that the window has passed."""
        if self._sinks is None or not passed:
            return rows[:, :, passed:]
        return torch.cat([self._sinks[which], rows[:, :, passed + self.sinks :]], dim=2)

    def _keep_sinks(self, first: Tensor, second: Tensor) -> None:
        """Copy the first tokens, before others are written over them."""
        if self.sinks and self._sinks is None and self._buffer.length > self.sinks:
            with torch.inference_mode(False), torch.no_grad():
                self._sinks = first[:, :, : self.sinks].clone(), second[:, :, : self.sinks].clone()

    def _lead_with_sinks(self) -> None:
        """Put the sinks in front of what the window reaches, where nothing is needed any more."""
        if self._buffer.viewed:
            self._move()
            return
        assert self._sinks is not None
        begin = self._passed
        for rows, sinks in zip((self._buffer.first, self._buffer.second), self._sinks, strict=True):
            assert rows is not None
            rows.data[:, :, begin : begin + self.sinks].copy_(sinks)

    def _move(self) -> None:
        """The sinks and what the window reaches, into a new buffer."""
        first, second = self._buffer.first, self._buffer.second
        assert first is not None
        assert second is not None
        moved = ContiguousCache()
        with torch.no_grad():
            passed = self._passed
            moved.append(self._from(first, passed, 0), self._from(second, passed, 1))
        self._buffer = moved
        self._lead = self.sinks


def _words(choice: Any) -> str:
    first = f" and the first {choice.sinks}" if choice.sinks else ""
    return f"the last {choice.size} tokens{first}"


def _obstacle(size: int) -> str | None:
    return None if 1 <= size < 2**31 else ", expected a window of 1 to 2**31 - 1 tokens"


KIND = CacheKind(
    "window",
    ("window:W", "window:W,sinks=S"),
    lambda choice: WindowCache(choice.size, choice.sinks),
    _words,
    obstacle=_obstacle,
)
