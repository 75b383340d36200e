"""Is a result right? Compared with the reference operator before anything is timed.

The reference runs in float32, on one kv head of one sequence (a few heads of latents) and a block
of queries at a time: every number of the result is checked, at any context, without the memory
that all scores would take.
"""

import torch
from torch import Tensor

from headwise.measure.inputs import Inputs
from headwise.ops import attention, latent_attention

# The largest error, relative to the largest number of the result. Scores, softmax weights and the
# output are rounded to the dtype (2^-24, 2^-11, 2^-9); this allows ten times that.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

# How many scores the reference holds at once.
_BLOCK_SCORES = 2**25
_LATENT_HEADS = 4


def expected(inputs: Inputs) -> Tensor:
    """What the operator must give, causal attention: [B, H, S, V] in float32.

    >>> from headwise.measure.inputs import make_inputs
    >>> from headwise.measure.shape import parse_shape
    >>> shape = parse_shape("decode:6/2:d8:32:b3")
    >>> expected(make_inputs(shape, torch.bfloat16)).shape
    torch.Size([3, 6, 1, 8])
    """
    sequence = _latent_sequence if inputs.shape.latent else _sequence
    return torch.cat([sequence(inputs, index) for index in range(inputs.shape.batch)])


def error(out: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number; NaN where `out` has one.

    >>> error(torch.tensor([3.5, 2.0]), torch.tensor([4.0, 2.0]))
    0.125
    """
    difference = (out.float() - expected).abs().max()
    return float(difference / expected.abs().max())


def _sequence(inputs: Inputs, index: int) -> Tensor:
    """One sequence of the batch: [1, H, S, V]."""
    shape, group = inputs.shape, inputs.shape.spec.group_size
    length = shape.lengths[index]
    block = max(1, _BLOCK_SCORES // (group * length))
    query, key, value = (tensor[index : index + 1] for tensor in inputs.tensors)
    heads = []
    for kv_head in range(shape.spec.kv_heads):
        some = slice(kv_head * group, (kv_head + 1) * group)
        keys, values = (rows[:, kv_head : kv_head + 1, :length].float() for rows in (key, value))
        seen, blocks = length - shape.query_length, []
        for some_queries in query[:, some].split(block, dim=2):
            seen += some_queries.shape[2]
            rows = some_queries.float(), keys[:, :, :seen], values[:, :, :seen]
            blocks.append(attention(*rows, causal=True, backend="reference"))
        heads.append(torch.cat(blocks, dim=2))
    return torch.cat(heads, dim=1)


def _latent_sequence(inputs: Inputs, index: int) -> Tensor:
    """One sequence of the batch, its latents expanded to keys and values: [1, H, S, V]."""
    length, sequence = inputs.shape.lengths[index], slice(index, index + 1)
    query_nope, query_rope, latent, key_rope, w_uk, w_uv = inputs.tensors
    heads = []
    for first in range(0, inputs.shape.spec.heads, _LATENT_HEADS):
        some = slice(first, first + _LATENT_HEADS)
        tensors = (
            *(query[sequence, some] for query in (query_nope, query_rope)),
            *(rows[sequence, :length] for rows in (latent, key_rope)),
            *(weight[some] for weight in (w_uk, w_uv)),
        )
        out = latent_attention(
            *(tensor.float() for tensor in tensors),
            paradigm="expanded",
            causal=True,
            backend="reference",
        )
        assert isinstance(out, Tensor)
        heads.append(out)
    return torch.cat(heads, dim=1)
