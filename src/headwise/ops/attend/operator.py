"""`attention`: multi-head, multi-query and grouped-query attention as one operator."""

from typing import Any, Literal, overload

from torch import Tensor

from headwise.ops.attend.by_position import attend_by_position
from headwise.ops.attend.call import AttentionCall, Options, check, default_scale
from headwise.ops.attend.checks import keys_and_values
from headwise.ops.backend import choose, explain_problem
from headwise.ops.backend.protocol import Explanation
from headwise.ops.views import KV


@overload
def attention(
    query: Tensor,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    *,
    kv: KV | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    kv_lengths: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    indices: Tensor | None = ...,
    block_indices: Tensor | None = ...,
    block_size: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    *,
    kv: KV | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    kv_lengths: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    indices: Tensor | None = ...,
    block_indices: Tensor | None = ...,
    block_size: int | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    kv: KV | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_positions: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend: softmax(scale * query key^T) value, each query head h on kv head h // (H / K).

    Example:
        >>> import torch, headwise
        >>> query = torch.randn(2, 6, 1, 16)  # [B, H, S, D]: one new token, 6 query heads
        >>> key = torch.randn(2, 3, 50, 16)  # [B, K, L, D]: 3 kv heads, 50 cached tokens
        >>> value = torch.randn(2, 3, 50, 16)  # [B, K, L, V]
        >>> headwise.attention(query, key, value, causal=True).shape
        torch.Size([2, 6, 1, 16])

    Args:
        query: [B, H, S, D], in float32, bfloat16, float16 or float64.
        key: [B, K, L, D], H a multiple of K. K = H is multi-head, K = 1 multi-query attention.
        value: [B, K, L, V]; V may differ from D.
        kv: a view of a cache in place of key and value: what `append` of a paged or a quantised
            cache returns.
        causal: a query sees no key after its own position. The LAST query sits on the LAST key.
        scale: factor of the scores, D^-0.5 by default.
        window: with causal, the query at position p sees keys p - window + 1 .. p.
        sinks: [H], logits that enter the softmax denominator and the lse, not scaled, not capped.
        softcap: c in c * tanh(score / c).
        alibi_slopes: [H], adds slope * (key position - query position).
        bias: added to the scores after the cap; broadcasts to [B, H, S, L].
        mask: boolean, True = attend; broadcasts to [B, H, S, L].
        kv_lengths: [B] int, tokens held by each sequence; keys past them are never read, and
            causality aligns with each sequence's own last key. A view brings its own.
        key_positions: [L] int64, with causal: where the keys are, counted from the last query,
            which is at 0 and the one before at -1; in increasing order, on the CPU best. For keys
            that are not all, as `merge_attention` puts together; by default the last key is at 0.
        indices: [B, 1 or K, S, T] int32, the keys that each query attends to, for all kv heads or
            for each; what causality, window, mask or lengths hide stays hidden. -1 is no key; a
            key that is named twice counts once. Under a compiler, and on other devices, a key that
            does not exist is none.
        block_indices: [B, 1 or K, S, n] int32, the same by blocks of block_size keys, counted from
            the first key; the last one may be shorter.
        block_size: keys of a block.
        return_lse: also return the log-sum-exp of the scores.
        backend: the name of the backend to force; by default the fastest that accepts the call.

    Returns:
        out [B, H, S, V] in the query's dtype; with return_lse also lse [B, H, S] (natural log,
        float32, or float64 for float64 inputs). A row that may attend to nothing is 0, its lse -inf
        (with a sink: the sink).

    Raises:
        ShapeError: shapes, dtypes, devices or options that do not fit together.
        UnsupportedError: the forced backend is unknown or cannot serve the call.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), Shazeer 2019 (1911.02150), Ainslie et al. 2023
    (2305.13245).
    """
    key, value, kv_lengths = keys_and_values(key, value, kv, kv_lengths, "key and value")
    options = Options(
        scale=default_scale(query) if scale is None else scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        bias=bias,
        mask=mask,
        kv_lengths=kv_lengths,
        key_positions=key_positions,
        indices=indices,
        block_indices=block_indices,
        block_size=block_size,
        return_lse=return_lse,
    )
    call = AttentionCall(query, key, value, options, kv=kv)
    out, lse = run_call(call, backend)
    return out if lse is None else (out, lse)


def run_call(call: AttentionCall, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Check a call and run it: out [B,H,S,V] and, when asked, lse [B,H,S].

    Raises:
        ShapeError, UnsupportedError: as `attention`.
    """
    chosen = choose(check(call), backend)
    if call.options.key_positions is not None and chosen.name != "reference":
        return attend_by_position(call, lambda part: run_call(part, backend))
    return chosen.attend(call)


def explain(
    query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any
) -> Explanation:
    """Say which backend `attention` would run with the same arguments, and why not the others.

    Example:
        >>> import torch, headwise
        >>> query, kv = torch.randn(1, 6, 1, 16), torch.randn(1, 3, 50, 16)
        >>> print(headwise.explain(query, kv, kv, causal=True))
        cpu        runs      C++, each key and value read once for all heads of a group
        torch      slower    scaled_dot_product_attention, 2 query heads packed per kv head
        reference  slower    the definition: every score in full, in float32 or float64

    A `backend` among the options changes nothing: every backend is asked.

    Raises:
        ShapeError: as `attention`.
        TypeError: an option that `attention` does not have.
    """
    options.pop("backend", None)
    return explain_call(make_call(query, key, value, **options))


def explain_call(call: AttentionCall) -> Explanation:
    """`explain` of a call."""
    return explain_problem(check(call))


def make_call(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    kv: KV | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> AttentionCall:
    """The call of `attention` with these arguments."""
    key, value, kv_lengths = keys_and_values(key, value, kv, kv_lengths, "key and value")
    scale = default_scale(query) if scale is None else scale
    made = Options(scale=scale, kv_lengths=kv_lengths, **options)
    return AttentionCall(query, key, value, made, kv=kv)
