"""Is a result right? Compared with the reference operator before anything is timed.

The reference runs in float32, on one kv head of one sequence (a few heads of latents) and a block
of queries at a time: every number of the result is checked, at any context, without the memory
that all scores would take.
"""

import torch
from torch import Tensor

from headwise.measure.inputs import AttentionInputs, Inputs, LatentInputs
from headwise.measure.shape import Shape
from headwise.ops import attention, latent_attention

# The largest error, relative to the largest number of the result. Scores, softmax weights and the
# output are rounded to the dtype (2^-24, 2^-11, 2^-9); this allows ten times that.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

# How many scores the reference holds at once.
_BLOCK_SCORES = 2**25
_LATENT_HEADS = 4


def expected(shape: Shape, inputs: Inputs) -> Tensor:
    """What the operator must give, causal attention: [B, H, S, V] in float32.

    >>> from headwise.measure.inputs import make_inputs
    >>> from headwise.measure.shape import parse_shape
    >>> shape = parse_shape("decode:6/2:d8:32:b3")
    >>> expected(shape, make_inputs(shape, torch.bfloat16)).shape
    torch.Size([3, 6, 1, 8])
    """
    if isinstance(inputs, LatentInputs):
        parts = [_latent_sequence(shape, inputs, at) for at in range(shape.batch)]
    else:
        parts = [_sequence(shape, inputs, at) for at in range(shape.batch)]
    return torch.cat(parts)


def error(out: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number; NaN where `out` has one.

    >>> error(torch.tensor([3.5, 2.0]), torch.tensor([4.0, 2.0]))
    0.125
    """
    difference = (out.float() - expected).abs().max()
    return float(difference / expected.abs().max())


def _sequence(shape: Shape, inputs: AttentionInputs, at: int) -> Tensor:
    """Sequence `at` of the batch: [1, H, S, V]."""
    length, queries, group = shape.lengths[at], shape.query_length, shape.spec.group_size
    rows = max(1, _BLOCK_SCORES // (group * length))
    heads = []
    for kv_head in range(shape.spec.kv_heads):
        key = inputs.key[at : at + 1, kv_head : kv_head + 1, :length].float()
        value = inputs.value[at : at + 1, kv_head : kv_head + 1, :length].float()
        query = inputs.query[at : at + 1, kv_head * group : (kv_head + 1) * group].float()
        blocks = []
        for first in range(0, queries, rows):
            last = min(first + rows, queries)
            seen = length - queries + last
            blocks.append(
                attention(
                    query[:, :, first:last],
                    key[:, :, :seen],
                    value[:, :, :seen],
                    causal=True,
                    backend="reference",
                )
            )
        heads.append(torch.cat(blocks, dim=2))
    return torch.cat(heads, dim=1)


def _latent_sequence(shape: Shape, inputs: LatentInputs, at: int) -> Tensor:
    """Sequence `at` of the batch, its latents expanded to keys and values: [1, H, S, V]."""
    length = shape.lengths[at]
    latent, key_rope = inputs.latent[at : at + 1, :length], inputs.key_rope[at : at + 1, :length]
    heads = []
    for first in range(0, shape.spec.heads, _LATENT_HEADS):
        some = slice(first, first + _LATENT_HEADS)
        out = latent_attention(
            inputs.query_nope[at : at + 1, some].float(),
            inputs.query_rope[at : at + 1, some].float(),
            latent.float(),
            key_rope.float(),
            inputs.w_uk[some].float(),
            inputs.w_uv[some].float(),
            paradigm="expanded",
            causal=True,
            backend="reference",
        )
        assert isinstance(out, Tensor)
        heads.append(out)
    return torch.cat(heads, dim=1)
