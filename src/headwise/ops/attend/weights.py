"""The attention weights themselves, for looking at: never on the fast path.

`attention_weights` holds all of them, quadratic in memory; `score_rows` those of some queries.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.attend import reference
from headwise.ops.attend.call import AttentionCall, check
from headwise.ops.attend.operator import make_call
from headwise.ops.attend.visible import visible_keys


def attention_weights(query: Tensor, key: Tensor | None = None, **options: Any) -> Tensor:
    """The softmax weights that `attention` applies to the values.

    Example:
        >>> import torch
        >>> from headwise.ops import attention_weights
        >>> query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
        >>> weights = attention_weights(query, key, causal=True)
        >>> weights.shape, bool((weights[..., 0, 1:] == 0).all())
        (torch.Size([1, 4, 3, 3]), True)

    Args:
        query: [B, H, S, D].
        key: [B, K, L, D]; or `kv`, a view, among the options.
        options: those of `attention`, but return_lse and backend.

    Returns:
        [B, H, S, L], float32 (float64 for float64 inputs). A row sums to 1; to less with a sink;
        to 0 where it may attend to nothing.
    """
    return weights_of(make_call(query, key, key, **options))


def weights_of(call: AttentionCall) -> Tensor:
    """`attention_weights` of a call."""
    check(call)
    return reference.weights(call.dense())[0]


def score_rows(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The scores that enter the softmax, of chosen queries of one kv head; -inf where hidden.

    Example:
        >>> import torch
        >>> from headwise.ops import score_rows
        >>> query, key = torch.randn(3, 2, 8), torch.randn(50, 8)  # 3 heads, 2 of their queries
        >>> score_rows(query, key, torch.tensor([7, 49]), scale=8**-0.5, causal=True).shape
        torch.Size([3, 2, 50])

    Args:
        query: [G, S, D], the heads that share the kv head.
        key: [L, D], in the query's dtype, float32 or float64.
        positions: [S], the key that each query sits on.
        scale, causal, window, softcap: as in `attention`.
        bias: broadcasts to [G, S, L], added after the cap.
        mask: boolean, broadcasts to [G, S, L], True = attend.

    Returns:
        [G, S, L]. exp(score - lse) is the weight.
    """
    heads, rows, dim = query.shape
    score = (scale * query).reshape(-1, dim) @ key.T
    score = score.view(heads, rows, -1)
    if softcap is not None:
        score.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        score.add_(bias)
    if mask is not None:
        score.masked_fill_(~mask, float("-inf"))
    if causal:
        # what all rows see needs no comparison
        first = int(positions.min()) + 1
        last = 0 if window is None else max(0, int(positions.max()) - window + 1)
        _hide(score[..., first:], positions, first, causal=True, window=None)
        _hide(score[..., :last], positions, 0, causal=False, window=window)
    return score


def _hide(score: Tensor, positions: Tensor, first: int, **rule: Any) -> None:
    """Set scores [..., S, keys] of keys from `first` on to -inf where the rule hides a key."""
    columns = torch.arange(first, first + score.shape[-1], device=score.device)
    visible = visible_keys(positions[:, None], columns, **rule)
    if visible is not None:
        score.masked_fill_(~visible, float("-inf"))
