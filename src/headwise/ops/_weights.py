"""The attention weights themselves, for looking at: quadratic in memory, never on the fast path."""

from torch import Tensor

from headwise.ops import _reference
from headwise.ops._attention import make_call


def attention_weights(query: Tensor, key: Tensor | None = None, **options: object) -> Tensor:
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
    weights, _ = _reference.weights(make_call(query, key, key, **options).dense())
    return weights
