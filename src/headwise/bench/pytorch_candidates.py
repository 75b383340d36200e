"""PyTorch's ways to compute attention: its operators, and products of matrices."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.bench.candidate import BOTH, Bind, Candidate, first_line, on_each
from headwise.errors import UnsupportedError
from headwise.measure.inputs import Inputs, make_inputs
from headwise.measure.shape import Shape, parse_shape


def _sdpa(inputs: Inputs) -> Bind:
    mask, causal = inputs.mask, _is_square(inputs.shape)

    def run(inputs: Inputs) -> Tensor:
        query, key, value = inputs.tensors
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
        )

    return on_each(run)


def _sdpa_packed(inputs: Inputs) -> Bind:
    shape, spec = inputs.shape, inputs.shape.spec
    if spec.group_size == 1 or shape.query_length > 1:
        raise UnsupportedError(
            "packs the query heads of a group as rows: one query, several heads a group"
        )
    packed = (shape.batch, spec.kv_heads, spec.group_size, spec.head_dim)
    out = (shape.batch, spec.heads, 1, spec.value_dim)
    mask = inputs.mask

    def run(inputs: Inputs) -> Tensor:
        query, key, value = inputs.tensors
        return F.scaled_dot_product_attention(
            query.view(packed), key, value, attn_mask=mask
        ).reshape(out)

    return on_each(run)


def _matmul(inputs: Inputs) -> Bind:
    scale, hidden = inputs.shape.spec.scale, inputs.hidden()

    def run(inputs: Inputs) -> Tensor:
        query, key, value = inputs.tensors
        return _products(query.mul(scale), key, value, hidden)

    def run_latent(inputs: Inputs) -> Tensor:
        query_nope, query_rope, latent, _, w_uk, w_uv = inputs.tensors
        query, key = torch.cat([query_nope @ w_uk, query_rope], dim=-1), inputs.joined
        assert key is not None
        out = _products(query.mul_(scale), key, key[..., : latent.shape[-1]], hidden)
        return out @ w_uv.transpose(-1, -2)

    return on_each(run_latent if inputs.shape.latent else run)


def _products(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(query key^T) value: [B,H,S,D], [B,K,L,D] and [B,K,L,V] give [B,H,S,V]."""
    batch, heads, queries, dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, dim)  # those of a group share their keys
    scores = rows @ key.transpose(-1, -2)
    if hidden is not None:
        scores.view(batch, heads, queries, -1).masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value).view(batch, heads, queries, -1)


def _flex(inputs: Inputs) -> Bind:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks, shape = None, inputs.shape
    queries, context = shape.query_length, max(shape.lengths)
    if inputs.mask is not None or _is_square(shape):
        ends = torch.tensor(shape.lengths, device=inputs.device)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= ends[batch] - queries + query

        blocks = create_block_mask(
            visible, shape.batch, None, queries, context, device=inputs.device.type
        )
    # after several shapes the compiler refuses one more, as all share one function
    torch.compiler.reset()
    flex = _compiled_flex()
    return on_each(lambda inputs: flex(*inputs.tensors, block_mask=blocks, enable_gqa=True))


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.cache
def _flex_missing() -> str | None:
    """Whether a small flex_attention compiles: it needs a C++ compiler when it runs."""
    inputs = make_inputs(parse_shape("decode:4/2:d16:64"), torch.float32)
    try:
        bind = _flex(inputs)
        with torch.inference_mode():
            bind(inputs)()
    except (RuntimeError, ImportError, OSError) as error:
        # Dynamo's and Inductor's errors are RuntimeErrors
        return f"flex_attention does not compile: {first_line(error)}"
    return None


def _is_square(shape: Shape) -> bool:
    """Whether SDPA's `is_causal`, which aligns the first query with the first key, is ours."""
    return shape.query_length == shape.context > 1 and not shape.ragged


SDPA = Candidate("sdpa", "PyTorch's SDPA with enable_gqa", _sdpa)
SDPA_PACKED = Candidate("sdpa-packed", "SDPA, the heads of a group as rows", _sdpa_packed)
MATMUL = Candidate(
    "matmul", "matmul, softmax, matmul; mla: on the joined key", _matmul, operators=BOTH
)
FLEX = Candidate("flex", "PyTorch's flex_attention, compiled", _flex, missing=_flex_missing)
