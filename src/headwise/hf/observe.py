"""Look on while an attached model attends: what each call of our attention function was given.

The run stays as it is: the log-sum-exp is asked for only where the backend that runs has it anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """One call, after it ran.

    query [B,H,S,D] and key [B,K,L,D]; for MLA with `content_dim` dims of content first and the rope
    part behind them: of the expanded heads (K = H), or absorbed, over the one latent (K = 1). out
    [B,S,H,V]. lse [B,H,S], None where the backend that ran does not give it. options: `causal`,
    `scale`, `window`, `softcap`, `sinks`, `bias` and `mask`, as `attention` takes them. latent: R
    and P, the cached row, for MLA. columns: the keys' positions where a cache has dropped some.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    out: Tensor
    lse: Tensor | None
    options: dict[str, Any]
    content_dim: int | None = None
    latent: tuple[int, int] | None = None
    columns: Tensor | None = None


Observer = Callable[[Seen], Tensor]
"""Gets each call and returns the out to go on with: the call's own, or one that it has changed."""

_OBSERVER: ContextVar[Observer | None] = ContextVar("headwise_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """While open, `observer` sees the calls that this thread's attached models make.

    A module that a compiler has traced, and one that is left to Transformers, shows nothing.
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def current_observer() -> Observer | None:
    """Who looks on; None under a compiler, which cannot trace it."""
    return None if torch.compiler.is_compiling() else _OBSERVER.get()
