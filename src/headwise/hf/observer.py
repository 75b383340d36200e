"""Observe an attached model while it attends: what each call of our attention function was given.

The run stays as it is: the log-sum-exp is asked for only where the backend that runs has it anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.hf.attend import attend_latents, attend_rows
from headwise.hf.latent import absorbed_query, receives_latents
from headwise.hf.request import Request
from headwise.ops import Options, explain_call, masked_options


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """One call, after it ran.

    query [B,H,S,D] and key [B,K,L,D]; for MLA with `content_dim` dims of content first and the rope
    part behind them: of the expanded heads (K = H), or absorbed, over the one latent (K = 1). out
    [B,S,H,V]. lse [B,H,S], None where the backend that ran does not give it. options: as
    `attention` takes them, with a mask for what was chosen. latent: R and P, the cached row, for
    MLA. columns: the keys' positions where a cache has dropped some.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    out: Tensor
    lse: Tensor | None
    options: Options
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
    """The observer of this thread; None under a compiler, which cannot trace it."""
    return None if torch.compiler.is_compiling() else _OBSERVER.get()


def observed(observer: Observer, request: Request) -> tuple[Tensor, Tensor | None]:
    """What the attention function returns, with the out that the observer makes of it."""
    query, latent, content_dim = request.query, None, None
    if receives_latents(request.module):
        latent = (request.key.shape[-1], request.value.shape[-1])
        content_dim = query.shape[-1] - latent[1]
    request.options.return_lse = latent is not None
    attended = attend_latents(request)
    if attended is not None and latent is not None:
        query, key = (
            absorbed_query(request.module, query, latent[1]),
            torch.cat(request.rows, dim=-1),
        )
        content_dim = latent[0]
    else:
        # PyTorch's own kernel gives no lse, and asked for it another one would run
        request.options.return_lse = False
        request.options.return_lse = explain_call(request.call()).chosen != "torch"
        attended, key = attend_rows(request), request.rows[0]
    out, weights, lse = attended
    if request.dropout:
        return out, weights
    seen = Seen(
        module=request.module,
        query=query,
        key=key,
        out=out,
        lse=lse,
        options=masked_options(request.options, request.query.shape[1], request.key.shape[2]),
        content_dim=content_dim,
        latent=latent,
        columns=request.columns,
    )
    return observer(seen), weights
