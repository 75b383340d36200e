"""The reference is the definition: equal to loops over single numbers, option by option."""

import math

import numpy as np
import pytest
import torch

from headwise import attention
from headwise.ops import attention_weights
from ops.by_hand import attend_by_hand

BATCH, KV_HEADS, GROUP, QUERIES, CONTEXT, DIM, VALUE_DIM = 2, 3, 5, 7, 11, 13, 17
HEADS = KV_HEADS * GROUP
# D products and L terms, of numbers of order 1, in float64
TOLERANCE = 10 * (DIM + CONTEXT) * torch.finfo(torch.float64).eps


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def reference(query, key, value, **options):
    return attention(query, key, value, backend="reference", return_lse=True, **options)


def assert_as_by_hand(query, key, value, **options):
    out, lse = reference(query, key, value, **options)
    arrays = {k: o.numpy() if isinstance(o, torch.Tensor) else o for k, o in options.items()}
    expected, expected_lse = attend_by_hand(query.numpy(), key.numpy(), value.numpy(), **arrays)
    np.testing.assert_allclose(out.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=TOLERANCE, atol=TOLERANCE)


def lengths(*values):
    return torch.tensor(values)


def chosen(heads, count, stop=None):
    shape = (BATCH, heads, QUERIES, count)
    return torch.randint(-1, CONTEXT if stop is None else stop, shape, dtype=torch.int32)


OPTIONS = {
    "nothing": dict,
    "causal": lambda: {"causal": True},
    "scale": lambda: {"scale": 0.37},
    "negative scale": lambda: {"scale": -0.37, "causal": True},
    "window": lambda: {"causal": True, "window": 3},
    "window of one": lambda: {"causal": True, "window": 1},
    "window wider than the context": lambda: {"causal": True, "window": 50},
    "sinks": lambda: {"sinks": draw(HEADS)},
    "softcap": lambda: {"softcap": 0.7},
    "ALiBi": lambda: {"alibi_slopes": draw(HEADS), "causal": True},
    "ALiBi of a bidirectional model": lambda: {"alibi_slopes": draw(HEADS)},
    "bias": lambda: {"bias": draw(BATCH, HEADS, QUERIES, CONTEXT)},
    "bias of one head": lambda: {"bias": draw(1, 1, QUERIES, CONTEXT)},
    "bias of one key": lambda: {"bias": draw(BATCH, HEADS, 1, 1), "softcap": 0.7},
    "mask": lambda: {"mask": draw(BATCH, HEADS, QUERIES, CONTEXT) > 0},
    "mask of all queries": lambda: {"mask": draw(BATCH, 1, 1, CONTEXT) > 0},
    "mask and causal": lambda: {"mask": draw(BATCH, 1, QUERIES, CONTEXT) > 0, "causal": True},
    "lengths": lambda: {"kv_lengths": lengths(4, 11)},
    "lengths and causal": lambda: {"kv_lengths": lengths(9, 5), "causal": True},
    "a length of 0": lambda: {"kv_lengths": lengths(0, 10), "causal": True},
    "a length of 0 with sinks": lambda: {"kv_lengths": lengths(0, 10), "sinks": draw(HEADS)},
    "lengths, window and ALiBi": lambda: {
        "kv_lengths": lengths(8, 11),
        "causal": True,
        "window": 4,
        "alibi_slopes": draw(HEADS),
    },
    "chosen keys": lambda: {"indices": chosen(1, 9), "causal": True},
    "chosen blocks of each kv head": lambda: {
        "block_indices": chosen(KV_HEADS, 2, -(-CONTEXT // 4)),
        "block_size": 4,
        "mask": draw(BATCH, 1, QUERIES, CONTEXT) > -1,
    },
    "everything": lambda: {
        "kv_lengths": lengths(10, 6),
        "causal": True,
        "window": 5,
        "scale": 0.41,
        "sinks": draw(HEADS),
        "softcap": 1.3,
        "alibi_slopes": draw(HEADS),
        "bias": draw(1, HEADS, 1, CONTEXT),
        "mask": draw(BATCH, 1, QUERIES, CONTEXT) > -1,
        "indices": chosen(KV_HEADS, 9),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_loops_over_numbers(name):
    query = draw(BATCH, HEADS, QUERIES, DIM)
    key = draw(BATCH, KV_HEADS, CONTEXT, DIM)
    value = draw(BATCH, KV_HEADS, CONTEXT, VALUE_DIM)
    assert_as_by_hand(query, key, value, **OPTIONS[name]())


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (7, 1), (6, 3), (6, 2)])
@pytest.mark.parametrize(("length", "context"), [(1, 5), (3, 5), (5, 5), (7, 5)])
def test_every_layout_of_heads_and_lengths_equals_loops(heads, kv_heads, length, context):
    query = draw(2, heads, length, 11)
    key, value = draw(2, kv_heads, context, 11), draw(2, kv_heads, context, 13)
    assert_as_by_hand(query, key, value, causal=True)


def weights_of(length, context, **options):
    """[S, L]: which key gets which weight when all scores before the options are 0."""
    query, key = torch.zeros(1, 1, length, 3), torch.zeros(1, 1, context, 3)
    value = torch.eye(context).view(1, 1, context, context)
    return attention(query, key, value, backend="reference", **options)[0, 0]


def seen(length, context, **options):
    """For each query, the keys with a weight above 0."""
    return [row.nonzero().flatten().tolist() for row in weights_of(length, context, **options)]


def test_the_last_query_sits_on_the_last_key():
    assert seen(2, 5, causal=True) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_queries_before_position_0_see_nothing():
    assert seen(5, 3, causal=True) == [[], [], [0], [0, 1], [0, 1, 2]]


def test_window_excludes_the_token_just_outside_it():
    assert seen(1, 7, causal=True, window=3) == [[4, 5, 6]]
    assert seen(3, 7, causal=True, window=2) == [[3, 4], [4, 5], [5, 6]]


def test_causality_follows_the_length_of_each_sequence():
    assert seen(2, 7, causal=True, kv_lengths=lengths(4)) == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen(2, 7, causal=True, window=2, kv_lengths=lengths(4)) == [[1, 2], [2, 3]]
    assert seen(2, 7, causal=True, kv_lengths=lengths(1)) == [[], [0]]
    assert seen(2, 7, causal=True, kv_lengths=lengths(0)) == [[], []]


def test_query_head_h_uses_kv_head_h_over_group_size():
    query, key = torch.randn(1, 6, 1, 5), torch.randn(1, 3, 2, 5)
    value = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 1)
    out = attention(query, key, value, backend="reference").flatten()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0]))


def test_alibi_of_a_positive_slope_prefers_the_nearer_key():
    weights = weights_of(1, 3, causal=True, alibi_slopes=torch.tensor([math.log(2.0)]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 4.0]]) / 7)


def test_a_sink_takes_its_share_of_the_softmax():
    # two keys with score 0 and a sink of log 6: 1 / (1 + 1 + 6) each
    weights = weights_of(1, 2, sinks=torch.tensor([math.log(6.0)]))
    torch.testing.assert_close(weights, torch.full((1, 2), 0.125))


def test_sinks_are_neither_scaled_nor_capped():
    sinks = torch.tensor([math.log(6.0)])
    weights = weights_of(1, 2, sinks=sinks, scale=100.0, softcap=0.01)
    torch.testing.assert_close(weights, torch.full((1, 2), 0.125))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("sink", [1000.0, -1000.0])
def test_a_sink_far_from_the_scores_does_not_overflow(sink, backend):
    query, kv, sinks = torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 2, 3), torch.tensor([sink])
    out, lse = attention(query, kv, kv, sinks=sinks, return_lse=True, backend=backend)
    assert (out == (0.0 if sink > 0 else 1.0)).all()
    torch.testing.assert_close(lse.item(), max(sink, math.log(2.0)))


def test_softcap_bounds_the_score_and_comes_before_the_bias():
    query, key = torch.full((1, 1, 1, 1), 1e4), torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    bias = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2)
    lse = reference(query, key, key, softcap=3.0, bias=bias)[1]
    # scores of 3 and -3, not of 1e4; the bias is added whole
    torch.testing.assert_close(lse.item(), math.log(math.exp(3) + math.exp(7)))


def test_scale_is_head_dim_to_the_minus_half_by_default():
    query, key = draw(1, 2, 3, 16), draw(1, 2, 3, 16)
    default, given = reference(query, key, key), reference(query, key, key, scale=0.25)
    torch.testing.assert_close(default, given)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lse_of_a_row_that_sees_nothing_is_minus_infinity(backend):
    query, kv = draw(1, 3, 5, 7), draw(1, 3, 2, 7)
    out, lse = attention(query, kv, kv, causal=True, return_lse=True, backend=backend)
    assert (lse[:, :, :3] == -math.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    assert (out[:, :, :3] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lse_of_a_row_that_sees_only_its_sink_is_the_sink(backend):
    query, kv, sinks = draw(1, 3, 5, 7), draw(1, 3, 2, 7), draw(3)
    out, lse = attention(query, kv, kv, causal=True, sinks=sinks, return_lse=True, backend=backend)
    torch.testing.assert_close(lse[0, :, :3], sinks.view(3, 1).expand(3, 3))
    assert (out[:, :, :3] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_hidden_by_a_bias_of_minus_infinity_is_empty(backend):
    query, kv, bias = draw(1, 3, 2, 7), draw(1, 3, 5, 7), torch.zeros(1, 1, 2, 5)
    bias[:, :, 0] = -math.inf
    out, lse = attention(query, kv, kv, bias=bias.double(), return_lse=True, backend=backend)
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == -math.inf).all()
    assert (attention(query, kv, kv, bias=bias.double(), backend=backend)[:, :, 0] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch", None])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_results(dtype, bias_dtype, backend):
    query, kv = torch.randn(1, 4, 3, 5, dtype=dtype), torch.randn(1, 2, 7, 5, dtype=dtype)
    bias = torch.zeros(1, 1, 3, 7, dtype=bias_dtype)
    out, lse = attention(query, kv, kv, bias=bias, return_lse=True, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_weights_times_values_are_the_output():
    query, key = draw(2, 6, 5, 7), draw(2, 3, 11, 7)
    value, options = draw(2, 3, 11, 13), {"causal": True, "sinks": draw(6), "softcap": 1.5}
    weights = attention_weights(query, key, **options)
    assert weights.shape == (2, 6, 5, 11)
    assert (weights.sum(dim=-1) < 1).all()
    out = torch.einsum("bhsl,bhlv->bhsv", weights, value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(out, attention(query, key, value, **options, backend="reference"))


def test_weights_of_a_row_that_sees_nothing_are_zero():
    weights = attention_weights(torch.randn(1, 2, 3, 5), torch.randn(1, 1, 2, 5), causal=True)
    torch.testing.assert_close(weights.sum(dim=-1), torch.tensor([0.0, 1.0, 1.0]).expand(1, 2, 3))
