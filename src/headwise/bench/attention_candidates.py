"""What computes attention over keys and values: headwise, and PyTorch's ways to do it."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import headwise.ops as ops
from headwise.bench.candidate import (
    Absent,
    Bind,
    Candidate,
    first_line,
    how,
    never_missing,
    on_each,
)
from headwise.measure.inputs import AttentionInputs, make_inputs
from headwise.measure.shape import Shape, parse_shape


def _headwise(shape: Shape, inputs: AttentionInputs) -> Bind:
    return on_each(lambda given: given.attend())


def chosen_backend(inputs: AttentionInputs) -> str:
    """Which of headwise's backends runs these inputs, and how."""
    given = inputs.query, inputs.key, inputs.value
    return how(ops.explain(*given, causal=True, kv_lengths=inputs.kv_lengths))


def _sdpa(shape: Shape, inputs: AttentionInputs) -> Bind:
    mask, causal = inputs.mask, _is_square(shape)
    return on_each(
        lambda given: F.scaled_dot_product_attention(
            given.query, given.key, given.value, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
    )


def _sdpa_packed(shape: Shape, inputs: AttentionInputs) -> Bind | Absent:
    spec = shape.spec
    if spec.group_size == 1 or shape.query_length > 1:
        return Absent("packs the query heads of a group as rows: one query, several heads a group")
    packed = (shape.batch, spec.kv_heads, spec.group_size, spec.head_dim)
    out = (shape.batch, spec.heads, 1, spec.value_dim)
    mask = inputs.mask
    return on_each(
        lambda given: F.scaled_dot_product_attention(
            given.query.view(packed), given.key, given.value, attn_mask=mask
        ).reshape(out)
    )


def _matmul(shape: Shape, inputs: AttentionInputs) -> Bind:
    spec, batch, queries = shape.spec, shape.batch, shape.query_length
    kv_heads, group = spec.kv_heads, spec.group_size
    hidden = inputs.hidden()
    if hidden is not None:
        hidden = hidden.unsqueeze(1)  # [B, K, G, S, L], with the heads of a group apart

    def run(given: AttentionInputs) -> Tensor:
        rows = given.query.reshape(batch, kv_heads, group * queries, spec.head_dim)
        scores = rows.mul(spec.scale) @ given.key.transpose(-1, -2)
        if hidden is not None:
            apart = scores.view(batch, kv_heads, group, queries, -1)
            apart.masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        return (weights @ given.value).view(batch, spec.heads, queries, spec.value_dim)

    return on_each(run)


def _flex(shape: Shape, inputs: AttentionInputs) -> Bind:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = None
    queries, context, lengths = shape.query_length, max(shape.lengths), inputs.kv_lengths
    if inputs.mask is not None or _is_square(shape):
        ends = torch.tensor(shape.lengths) if lengths is None else lengths

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= ends[batch] - queries + query

        blocks = create_block_mask(visible, shape.batch, None, queries, context, device="cpu")
    # after several shapes the compiler refuses one more, as all share one function
    torch.compiler.reset()
    flex = _compiled_flex()
    return on_each(
        lambda given: flex(given.query, given.key, given.value, block_mask=blocks, enable_gqa=True)
    )


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.cache
def _flex_missing() -> str | None:
    """Whether a small flex_attention compiles: it needs a C++ compiler when it runs."""
    shape = parse_shape("decode:4/2:d16:64")
    inputs = make_inputs(shape, torch.float32)
    assert isinstance(inputs, AttentionInputs)
    try:
        bind = _flex(shape, inputs)
        with torch.inference_mode():
            bind(inputs)()
    except (RuntimeError, ImportError, OSError) as error:
        # Dynamo's and Inductor's errors are RuntimeErrors
        return f"flex_attention does not compile: {first_line(error)}"
    return None


def _is_square(shape: Shape) -> bool:
    """Whether SDPA's `is_causal`, which aligns the first query with the first key, is ours."""
    return shape.query_length == shape.context > 1 and not shape.ragged


HEADWISE = Candidate(
    "headwise", "headwise.attention, its default backend", never_missing, _headwise
)

PEERS = (
    Candidate("sdpa", "PyTorch's SDPA with enable_gqa", never_missing, _sdpa),
    Candidate("sdpa-packed", "SDPA, the heads of a group as rows", never_missing, _sdpa_packed),
    Candidate("matmul", "matmul, softmax, matmul", never_missing, _matmul),
    Candidate("flex", "PyTorch's flex_attention, compiled", _flex_missing, _flex),
)
