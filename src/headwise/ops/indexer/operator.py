"""`index_topk`: the lightning indexer of DeepSeek-V3.2, from its scores to the keys it chooses."""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import require_like, require_tensor
from headwise.ops.backend import choose_offer


def index_topk(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    top: int,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The keys with the largest scores of an indexer: sum over its heads of weight * relu(q . k).

    Example:
        >>> import torch
        >>> from headwise.ops import index_topk
        >>> query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 50, 16)  # 4 heads, 50 tokens
        >>> chosen = index_topk(query, key, torch.rand(1, 5, 4), 8, causal=True)
        >>> chosen.shape, chosen.dtype
        (torch.Size([1, 5, 8]), torch.int32)

    The scores of a part of the queries exist at once, and the choice takes time linear in L. It has
    no gradient.

    Args:
        query: [B, S, I, E], of I heads.
        key: [B, L, E], which the heads share.
        weights: [B, S, I], in any floating dtype.
        top: keys to choose, at least 1.
        causal: a query chooses no key after its own position. The LAST query sits on the LAST key.
        mask: boolean, True = may be chosen; broadcasts to [B, S, L].

    Returns:
        int32 [B, S, min(top, L)]: positions, ascending; of equal scores the first; then -1 where
        fewer may be chosen. What `indices` of `attention` takes, with a dim for the heads.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.

    Source: DeepSeek-V3.2, arXiv 2512.02556, section 2.1.
    """
    _check(query, key, weights, top, mask)
    if mask is not None:
        mask = mask[(None,) * (3 - mask.ndim)]
    top = min(top, key.shape[1])
    run = choose_offer("index", None, query, key)
    tensors = (tensor.detach() for tensor in (query, key, weights))
    chosen: Tensor = run(*tensors, top, causal=causal, mask=mask)
    return chosen


def _check(query: Any, key: Any, weights: Any, top: Any, mask: Any) -> None:
    require_tensor("query", query, 4)
    require_tensor("key", key, 3)
    require_tensor("weights", weights, 3)
    require_like(query, key=key)
    batch, length, heads, dim = query.shape
    if key.shape[0] != batch or key.shape[2] != dim or dim == 0:
        raise ShapeError(
            f"key has shape {list(key.shape)}, expected [B, L, E] with B={batch} and E={dim} of at "
            f"least 1, as in query {list(query.shape)}"
        )
    if weights.shape != query.shape[:3] or not weights.is_floating_point():
        raise ShapeError(
            f"weights has shape {list(weights.shape)} and dtype {weights.dtype}, expected "
            f"{[batch, length, heads]} of a floating dtype"
        )
    if weights.device != query.device:
        raise ShapeError(f"weights is on {weights.device} and query on {query.device}")
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ShapeError(f"top is {top!r}, expected an int of at least 1")
    if mask is None:
        return
    full = (batch, length, key.shape[1])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != query.device:
        raise ShapeError(f"mask is {mask!r:.60}, expected a boolean tensor on {query.device}")
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.ndim > 3 or not all(size in (1, whole) for size, whole in sizes):
        raise ShapeError(
            f"mask has shape {list(mask.shape)}, expected one that broadcasts to [B, S, L] = "
            f"{list(full)}"
        )
