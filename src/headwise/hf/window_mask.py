"""The mask of a causal sliding window as a rule, in place of its S x L booleans."""

from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from headwise.hf.cached_rows import WindowKV
from headwise.hf.stock_names import is_tracing


class WindowMask(Tensor):
    """A boolean mask [B,1,S,L] with no memory of its own: the last query sits on the last key, and
    each sees `window` keys, itself the last.

    Our attention function takes the rule out. Whatever else computes with the mask (a module that
    slices it or adds to it, stock attention) gets the booleans. They are made once, and from then
    on they are the mask, as somebody may write to them.
    """

    window: int
    booleans: Tensor | None

    @staticmethod
    def __new__(
        cls, size: tuple[int, int, int, int], window: int, device: torch.device
    ) -> "WindowMask":
        mask: WindowMask = Tensor._make_wrapper_subclass(cls, size, dtype=torch.bool, device=device)
        mask.window, mask.booleans = window, None
        return mask

    def dense(self) -> Tensor:
        """A plain tensor [B,1,S,L], one plane for all sequences."""
        if self.booleans is None:
            queries, keys = self.shape[2:]
            plane = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.device)
            plane = plane.tril(keys - queries).triu(keys - queries - self.window + 1)
            self.booleans = plane.expand(self.shape)
        return self.booleans

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    # what looks at memory does not pass the dispatch above

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def tolist(self) -> list[Any]:
        return self.dense().tolist()

    def data_ptr(self) -> int:
        return self.dense().data_ptr()

    def untyped_storage(self) -> Any:
        return self.dense().untyped_storage()

    def share_memory_(self) -> Tensor:
        return self.dense().share_memory_()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, window={self.window})"


def window_of(mask: WindowMask, query: Tensor, key: Tensor, kv: Any) -> int | None:
    """The window that says all of a mask to queries [B,H,S,D] and keys [B,K,L,D], or their view.

    None where the booleans are the mask, and where a cache has dropped keys that it counts.
    """
    fits = mask.shape[2:] == (query.shape[2], key.shape[2]) and not isinstance(kv, WindowKV)
    return mask.window if fits and mask.booleans is None else None


def is_window(function: Any, window: int) -> bool:
    """Whether a mask function of Transformers is exactly causality and a window.

    function(batch, head, query position, key position) gives booleans. Only one that is made of
    code and whole numbers can be, as it depends on positions alone; one that holds a tensor (chunks
    that begin after the padding, packed sequences), reads a global, or looks at its batch or head
    is taken for something else.
    """
    parts = _parts(function)
    if parts is None or window < 1:
        return False
    known = _KNOWN.get((parts, window))
    if known is None:
        if is_tracing(torch.zeros(())):  # a fake tensor, which has no value to look at
            return False
        known = _KNOWN[parts, window] = _is_window(function, window)
    return known


# What was found out about mask functions: every forward makes new ones, of the same code.
_KNOWN: dict[tuple[Any, int], bool] = {}
# More parts than any mask function has; one that refers to itself has no end of them.
_MOST_PARTS = 32


def _parts(function: Any) -> tuple[Any, ...] | None:
    """The code and the numbers that a function is made of; None if it has anything else.

    Of what its file has, it may name modules alone: others may change.
    """
    parts: list[Any] = []
    pending = [function]
    for part in pending:
        kind = type(part)
        if kind is int:
            parts.append(part)
        elif kind is tuple:
            parts.append(len(part))
            pending += part
        elif kind is FunctionType and part.__defaults__ is None and len(pending) < _MOST_PARTS:
            outside = part.__globals__.keys() & part.__code__.co_names
            if not all(isinstance(part.__globals__[name], ModuleType) for name in outside):
                return None
            parts.append(part.__code__)
            pending += [cell.cell_contents for cell in part.__closure__ or ()]
        else:
            return None
    return tuple(parts)


class _Unread:
    """A batch or head that a rule of positions does not look at."""

    def __getattribute__(self, name: str) -> Any:
        raise TypeError(f"a window does not ask for the {name} of its batch or head")

    def _read(self, *others: Any) -> Any:
        raise TypeError("a window does not compute with its batch or head")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = _read
    __index__ = __bool__ = __int__ = __hash__ = _read


def _is_window(function: Any, window: int) -> bool:
    """Look at whole rows: two in a row tell chunks, the others gaps and keys that all see."""
    starts = [0, window - 1, window, window + 1, 2 * window, 3 * window]
    rows = torch.tensor(starts, device="cpu")[:, None]
    keys = torch.arange(3 * window + 2, device="cpu")
    try:
        found = function(_Unread(), _Unread(), rows, keys).expand(len(starts), len(keys))
    except (TypeError, IndexError, RuntimeError):  # it looks at its batch or head
        return False
    return torch.equal(found, (keys <= rows) & (keys > rows - window))
