"""`latent_attention`: multi-head latent attention (MLA) in its two equal forms.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C. A token is cached as a latent c
(rank R) and one rotary key k (dim P) that all heads share. Head h has key [w_uk[h] c | k] and value
w_uv[h] c. Expanded: build them and run multi-head attention. Absorbed: since
q . (w_uk c) = (w_uk^T q) . c, fold w_uk into the query and w_uv behind the attention, which is then
multi-query attention with key [c | k] and value c: the context is never expanded. Where N is 0,
every part of a key is rotated, and the key is k alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.call import AttentionCall, Options
from headwise.ops.attend.checks import (
    keys_and_values,
    require_lengths,
    require_like,
    require_tensor,
)
from headwise.ops.attend.operator import run_call
from headwise.ops.backend import choose_offer
from headwise.ops.latent import reference
from headwise.ops.latent.paradigm import Paradigm, choose_paradigm
from headwise.ops.latent.parts import LatentCall, parts
from headwise.ops.views import KV


def latent_attention(
    query_nope: Tensor,
    query_rope: Tensor,
    latent: Tensor | None = None,
    key_rope: Tensor | None = None,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    kv: KV | None = None,
    paradigm: Paradigm = "auto",
    causal: bool = False,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over cached latents and rotary keys.

    Example:
        >>> import torch, headwise
        >>> heads, nope, rope, rank, dim = 4, 16, 8, 32, 16
        >>> out = headwise.latent_attention(
        ...     torch.randn(1, heads, 1, nope),
        ...     torch.randn(1, heads, 1, rope),
        ...     torch.randn(1, 50, rank),
        ...     torch.randn(1, 50, rope),
        ...     torch.randn(heads, nope, rank),
        ...     torch.randn(heads, dim, rank),
        ...     causal=True,
        ... )
        >>> out.shape
        torch.Size([1, 4, 1, 16])

    Args:
        query_nope: [B, H, S, N], the part of the queries without position; N may be 0.
        query_rope: [B, H, S, P], the rotated part.
        latent: [B, L, R], the cached (normalised) latents.
        key_rope: [B, L, P], the cached rotated keys, shared by all heads.
        w_uk: [H, N, R], from latents to keys.
        w_uv: [H, V, R], from latents to values.
        kv: a view of a cache of latents and rope keys, [B, 1, L, R] and [B, 1, L, P], in place of
            both. "expanded" takes the latents out of it first.
        paradigm: "expanded" (up-project the latents, run as MHA), "absorbed" (fold w_uk into the
            query and w_uv after, run as MQA), or "auto": the one with less counted work.
        causal, kv_lengths, key_positions, window, sinks, mask, return_lse, backend: as in
            `attention`.
        indices: [B, 1, S, T] int32, as in `attention`: the tokens that each query attends to.
        scale: factor of the scores, (N + P)^-0.5 by default.

    Returns:
        out [B, H, S, V]; with return_lse also lse [B, H, S].

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: the forced backend is unknown or cannot serve the call.
    """
    latent, key_rope, kv_lengths = keys_and_values(
        latent, key_rope, kv, kv_lengths, "latent and key_rope"
    )
    batch, context = _check(query_nope, query_rope, latent, key_rope, kv, w_uk, w_uv, paradigm)
    if indices is not None:
        require_tensor("indices", indices, 4)
        if indices.shape[1] != 1:
            raise ShapeError(
                f"indices has shape {list(indices.shape)}, expected [B, 1, S, T]: all heads attend "
                "to the same tokens"
            )
    assert w_uk is not None
    assert w_uv is not None
    rope_dim = query_rope.shape[-1]
    if scale is None:
        scale = float(query_nope.shape[-1] + rope_dim) ** -0.5
    if paradigm == "auto":
        paradigm = choose_paradigm(
            batch=batch,
            heads=w_uk.shape[0],
            query_length=query_nope.shape[2],
            context=context,
            nope_dim=w_uk.shape[1],
            rope_dim=rope_dim,
            value_dim=w_uv.shape[1],
            rank=w_uk.shape[2],
            itemsize=query_nope.element_size(),
            chosen=None if indices is None else indices.shape[-1],
        )
    if query_nope.shape[2] > 1:  # a prompt, which may be large
        given = {"causal": causal, "window": window, "scale": scale, "return_lse": return_lse}
        given |= {"paradigm": paradigm, "backend": backend, "key_positions": key_positions}
        whole = LatentCall(
            *(query_nope, query_rope, None if kv else latent, None if kv else key_rope, w_uk, w_uv),
            kv,
            None if kv is not None and kv.lengths is not None else kv_lengths,
            sinks,
            mask,
            indices,
            given,
        )
        cut = parts(whole, paradigm, context)
        if cut is not None:
            size = (*query_nope.shape[:3], w_uv.shape[1])
            done = (latent_attention(**part.arguments()) for part in cut[1])
            return _joined(cut[0], size, done)
    options = Options(
        scale=scale,
        causal=causal,
        window=window,
        sinks=sinks,
        kv_lengths=kv_lengths,
        key_positions=key_positions,
        mask=mask,
        indices=indices,
        return_lse=return_lse,
    )
    if kv is None:
        latent, key_rope = latent.unsqueeze(1), key_rope.unsqueeze(1)
    if paradigm == "expanded":
        if kv is not None:
            latent, key_rope = kv.dense(query_nope.dtype)
        if kv_lengths is not None:
            require_lengths(kv_lengths, latent.shape[0], latent.shape[2], latent.device)
            latent = _zero_past(latent, kv_lengths)
        query = torch.cat([query_nope, query_rope], dim=-1)
        call = AttentionCall(query, *reference.expand(latent, key_rope, w_uk, w_uv), options)
    elif w_uk.shape[1] == 0:
        exchanged = None if kv is None else kv.exchanged()
        call = AttentionCall(query_rope, key_rope, latent, options, kv=exchanged)
    elif rope_dim == 0:
        query, alone = _project(query_nope, w_uk, backend, up=True), kv and kv.keys_alone()
        call = AttentionCall(query, latent, latent, options, kv=alone)
    else:
        query = _project(query_nope, w_uk, backend, up=True)
        call = AttentionCall(query, latent, latent, options, query_rope, key_rope, kv)
    out, lse = run_call(call, backend)
    if paradigm == "absorbed":
        out = _project(out, w_uv, backend, up=False)
    return out if lse is None else (out, lse)


def _joined(dim: int, size: tuple[int, ...], done: Iterator[Any]) -> Tensor | tuple[Tensor, Tensor]:
    """The results of parts, of queries or heads, as one: each is put in its place as it comes."""
    whole: list[Tensor] = []
    first = 0
    for result in done:
        results = result if isinstance(result, tuple) else (result,)
        if not whole:
            whole = [part.new_empty(size[: part.ndim]) for part in results]
        count = results[0].shape[dim]
        for to, part in zip(whole, results, strict=True):
            to.narrow(dim, first, count).copy_(part)
        first += count
    return whole[0] if len(whole) == 1 else (whole[0], whole[1])


def _project(x: Tensor, weight: Tensor, backend: str | None, *, up: bool) -> Tensor:
    """x weight where `up`, else x weight^T."""
    product: Tensor = choose_offer("project", backend, x, weight)(x, weight, up=up)
    return product


def _zero_past(latent: Tensor, kv_lengths: Tensor) -> Tensor:
    """latent [B,1,L,R], zero past each length: NaN there would reach the weights' gradients."""
    index = torch.arange(latent.shape[2], device=latent.device)
    past = index >= kv_lengths[:, None]
    return latent.masked_fill(past[:, None, :, None], 0.0)


def _check(
    query_nope: Any,
    query_rope: Any,
    latent: Any,
    key_rope: Any,
    kv: KV | None,
    w_uk: Any,
    w_uv: Any,
    paradigm: str,
) -> tuple[int, int]:
    """B and L, or `ShapeError` on the first thing that does not fit."""
    if paradigm not in ("auto", "expanded", "absorbed"):
        raise ShapeError(
            f"paradigm is {paradigm!r}, expected one of 'auto', 'expanded', 'absorbed'"
        )
    for name, tensor in (("query_nope", query_nope), ("query_rope", query_rope)):
        require_tensor(name, tensor, 4)
    threes = {"w_uk": w_uk, "w_uv": w_uv}
    if kv is None:
        threes |= {"latent": latent, "key_rope": key_rope}
    for name, tensor in threes.items():
        require_tensor(name, tensor, 3)
    require_like(query_nope, query_rope=query_rope, **threes)
    batch, heads, length, nope_dim = query_nope.shape
    rope_dim = query_rope.shape[3]
    if kv is None:
        context, rank = latent.shape[1:]
        shapes = tuple(latent.shape), tuple(key_rope.shape)
    else:
        kv.check(query_nope)
        kv_batch, kv_heads, context, rank, kv_rope = kv.shape
        if kv_heads != 1:
            raise ShapeError(f"kv holds {kv_heads} heads, expected 1: latents and rope keys")
        shapes = (kv_batch, context, rank), (kv_batch, context, kv_rope)
    for name, shape, wanted in (
        ("latent", shapes[0], (batch, context, rank)),
        ("key_rope", shapes[1], (batch, context, rope_dim)),
    ):
        if shape != wanted:
            raise ShapeError(
                f"{name} has shape {list(shape)}, expected {list(wanted)} to fit query_nope "
                f"{list(query_nope.shape)}"
            )
    expected = {
        "query_rope": (query_rope, (batch, heads, length, rope_dim)),
        "w_uk": (w_uk, (heads, nope_dim, rank)),
        "w_uv": (w_uv, (heads, w_uv.shape[1], rank)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} to fit query_nope "
                f"{list(query_nope.shape)} and latent {list(shapes[0])}"
            )
    if 0 in (nope_dim + rope_dim, rank, w_uv.shape[1]):
        raise ShapeError(
            f"w_uk has shape {list(w_uk.shape)}, w_uv {list(w_uv.shape)} and key_rope "
            f"{list(shapes[1])}, expected N + P, V and R of at least 1"
        )
    return batch, context
