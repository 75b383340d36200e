"""`top_keys`: exact search among keys, by the fastest backend that offers it."""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import require_like, require_tensor
from headwise.ops.backend import choose_offer


def top_keys(query: Tensor, key: Tensor, top: int, *, mask: Tensor | None = None) -> Tensor:
    """The keys with the largest q . k for each query and head: exact search, without an index.

    Example:
        >>> import torch, headwise
        >>> from headwise.ops import top_keys
        >>> query, key = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1000, 64)
        >>> chosen = top_keys(query, key, 32)
        >>> chosen.shape, chosen.dtype
        (torch.Size([1, 8, 1, 32]), torch.int32)

    Unlike the choice of `choose_keys`, which the heads of a group share, each head has its own. The
    keys are read once per kv head for up to 128 of its queries, and scores exist for 64 keys at a
    time. It has no gradient.

    Args:
        query: [B, H, S, D].
        key: [B, K, L, D], H a multiple of K.
        top: keys to choose, at least 1.
        mask: boolean [B or 1, L], True = may be chosen.

    Returns:
        int32 [B, H, S, min(top, L)]: positions, ascending; of equal scores the first; then -1 where
        fewer may be chosen. A score of -inf is not chosen, NaN is larger than all. Seen as [B, K,
        G * S, top] it is what `indices` of `attention` takes with the query seen as [B, K, G * S,
        D].

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
    """
    _check(query, key, top, mask)
    run = choose_offer("top_keys", None, query, key)
    chosen: Tensor = run(query.detach(), key.detach(), min(top, key.shape[2]), mask=mask)
    return chosen


def _check(query: Any, key: Any, top: Any, mask: Any) -> None:
    require_tensor("query", query, 4)
    require_tensor("key", key, 4)
    require_like(query, key=key)
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    fits = (key.shape[0], key.shape[3]) == (batch, dim) and dim > 0
    if not fits or kv_heads < 1 or heads % kv_heads:
        raise ShapeError(
            f"key has shape {list(key.shape)}, expected [B, K, L, D] with B={batch}, K that "
            f"divides {heads} and D={dim} of at least 1, as in query {list(query.shape)}"
        )
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ShapeError(f"top is {top!r}, expected an int of at least 1")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != query.device:
        raise ShapeError(f"mask is {mask!r:.60}, expected a boolean tensor on {query.device}")
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != key.shape[2]:
        raise ShapeError(
            f"mask has shape {list(mask.shape)}, expected [B or 1, L] = [{batch}, {key.shape[2]}]"
        )
