"""`linear_attention`: retention, gated linear attention, SSD and the gated delta rules as one."""

from torch import Tensor

from headwise.ops.attend.call import default_scale
from headwise.ops.backend import offer_of
from headwise.ops.linear_attention.call import LinearCall, check


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to a state of fixed size, which each token changes before it is asked.

    S_t = diag(exp(decay_t)) S_(t-1) + k_t u_t^T, and out_t = scale * S_t^T q_t. Without beta u_t is
    v_t; with it, it is the delta rule: beta_t (v_t - (diag(exp(decay_t)) S_(t-1))^T k_t).

    Example:
        >>> import torch, headwise
        >>> query, key = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)  # [B, K, S, D]
        >>> value = torch.randn(1, 4, 50, 32)  # [B, H, S, V]
        >>> decay, beta = -torch.rand(1, 4, 50), torch.rand(1, 4, 50)  # a gated delta net
        >>> key = torch.nn.functional.normalize(key, dim=-1)
        >>> out, state = headwise.linear_attention(query, key, value, decay=decay, beta=beta)
        >>> out.shape, state.shape
        (torch.Size([1, 4, 50, 32]), torch.Size([1, 4, 16, 32]))

    Args:
        query: [B, K, S, D], in float32, bfloat16, float16 or float64. Head h of the values asks and
            is kept by head h // (H / K).
        key: [B, K, S, D].
        value: [B, H, S, V], H a multiple of K.
        decay: logarithms of what a state is multiplied by, as a rule 0 or less: [H] (RetNet,
            lightning attention), [B, H, S] (gated delta net, Mamba-2) or [B, H, S, D] (KDA, GLA).
        beta: [B, H, S], how much of what a key stands for is replaced: the delta rule.
        scale: factor of the result, D^-0.5 by default.
        state: [B, H, D, V], of the tokens before, in any floating dtype.
        lengths: [B] int, the tokens of each sequence; at or past its length a token changes
            nothing, and gives 0.
        backend: the name of the backend to force; "reference" is the loop over tokens.

    Returns:
        out [B, H, S, V] in the query's dtype, and the state after the last token, in float32
        (float64 for float64 inputs). Both have gradients.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: no such backend.

    Sources: RetNet (arXiv 2307.08621), GLA (2312.06635), Mamba-2 (2405.21060), gated delta nets
    (2412.06464), Kimi Linear (2510.26692).
    """
    if scale is None:
        scale = default_scale(query)
    call = LinearCall(query, key, value, decay, beta, scale, state, lengths)
    check(call)
    return change_state(call, backend)


def change_state(call: LinearCall, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """out [B, H, S, V] and the state of a call whose tensors fit."""
    out, after = offer_of("linear_attention", backend, call)(call)
    return out, after
