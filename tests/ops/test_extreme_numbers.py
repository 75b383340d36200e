"""NaN, infinities, the largest and the smallest numbers, and very long contexts."""

import math

import pytest
import torch

from headwise import attention, explain
from headwise.caches import PagedCache, QuantizedCache
from headwise.ops import attention_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST = torch.finfo(torch.float32).min
# one part of the context, its edges, and many
CONTEXTS = (20, 300, 512, 513, 700, 1300, 5000)


def damage(what, query, key, value):
    """Put NaN where every query attends."""
    some = {
        "a query": (query,),
        "one key": (key[:, :, 7:8],),
        "most keys": (key[:, :, : max(8, key.shape[2] - 20)],),
        "the last key": (key[:, :, -1:],),
        "a value": (value[:, :, 3:4],),
    }
    for rows in some[what]:
        rows[...] = math.nan


@pytest.mark.parametrize("what", ["a query", "one key", "most keys", "the last key", "a value"])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_nan_reaches_the_result_at_every_length(what, length, count, level, threads):
    threads(count)
    for context in CONTEXTS:
        for dtype in DTYPES:
            query = torch.randn(1, 4, length, 64).to(dtype)
            key, value = torch.randn(2, 1, 2, context, 64).to(dtype)
            damage(what, query, key, value)
            for sinks in (None, torch.randn(4)):
                out, lse = attention(query, key, value, sinks=sinks, return_lse=True, backend="cpu")
                assert out.isnan().all(), (context, dtype)
                assert lse.isnan().all() or what == "a value", (context, dtype)


@pytest.mark.parametrize("what", ["a query", "one key", "most keys", "a value"])
@pytest.mark.parametrize(
    "cache", [lambda: PagedCache(16), *map(lambda b: lambda: QuantizedCache(b), (8, 4))]
)
def test_nan_reaches_the_result_from_every_cache(what, cache, level):
    for context in CONTEXTS:
        query = torch.randn(1, 4, 1, 64)
        key, value = torch.randn(2, 1, 2, context, 64)
        damage(what, query, key, value)
        view = cache().append(key, value)
        assert attention(query, kv=view, causal=True, backend="cpu").isnan().all(), context


def test_nan_that_nobody_attends_to_does_not_reach_the_result(level):
    query = torch.randn(1, 4, 1, 64)
    key, value = torch.randn(2, 1, 2, 5000, 64)
    expected = attention(query, key[:, :, 2560:], value[:, :, 2560:], backend="reference")
    mask = torch.arange(5000) >= 2560
    key[:, :, :2560] = math.nan
    value[:, :, :2560] = math.nan
    out = attention(query, key, value, mask=mask.view(1, 1, 1, -1), backend="cpu")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_sink_that_is_nan_reaches_rows_that_see_nothing(backend):
    query, kv = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 9, 16)
    sinks, hidden = torch.tensor([math.nan, 0.5]), torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    out, lse = attention(query, kv, kv, mask=hidden, sinks=sinks, return_lse=True, backend=backend)
    assert lse[0, 0].isnan().all()
    assert torch.equal(lse[0, 1], torch.tensor([0.5]))
    assert torch.equal(out[0, 1], torch.zeros(1, 16))


@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize("place", [5, 3000])
@pytest.mark.parametrize("damaged", [math.nan, math.inf])
def test_a_row_that_sees_nothing_is_zero_beside_damaged_values(
    damaged, place, length, level, threads
):
    query = torch.randn(1, 2, length, 64)
    key, value = torch.randn(2, 1, 1, 4096, 64)
    value[:, :, place] = damaged
    mask = torch.ones(1, 1, length, 4096, dtype=torch.bool)
    mask[:, :, 0] = False
    for sinks in (None, torch.randn(2)):
        for count in (1, 2, 3):
            threads(count)
            out = attention(query, key, value, mask=mask, sinks=sinks, backend="cpu")
            assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 64))
            assert not out[:, :, 1:, 0].isfinite().any()


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e3, 1e8, 1e9, 1e10, 1e20, 1e30])
def test_huge_scores_give_averages_of_the_values(size, dtype, length, level):
    # float32 tells scores of this size apart no closer than the size times 2^-24, so which keys win
    # is not said; but an average of values of 0 to 1 lies within, and the lse is the largest score
    for context in (128, 1500):
        query = torch.randn(1, 2, length, 64).to(dtype)
        key = (torch.randn(1, 1, context, 64) * size).to(dtype)
        value = torch.rand(1, 1, context, 64).to(dtype)
        out, lse = attention(query, key, value, scale=0.3, return_lse=True, backend="cpu")
        assert ((out >= 0) & (out <= 1)).all()
        largest = (0.3 * query.double() @ key.double().mT).amax(-1)
        torch.testing.assert_close(lse.double(), largest, rtol=1e-3, atol=1e-3)


def test_one_huge_score_takes_all(level):
    for dtype in DTYPES:
        query = torch.full((1, 2, 1, 32), 100.0, dtype=dtype)
        key = torch.randn(1, 1, 300, 32).to(dtype)
        key[:, :, 7] = 100.0
        value = torch.randn(1, 1, 300, 16).to(dtype)
        out, lse = attention(query, key, value, scale=1 / 32, return_lse=True, backend="cpu")
        torch.testing.assert_close(out, value[:, :, 7:8].expand_as(out))
        torch.testing.assert_close(lse, torch.full_like(lse, 1e4))


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("context", [2**23, 2**24 + 10, 2**26 + 7])
def test_alibi_counts_positions_that_floats_cannot(context, length, level):
    query, row = torch.randn(1, 1, length, 8), torch.randn(1, 1, 1, 8)
    key = row.expand(1, 1, context, 8)  # a stride of 0: no memory
    _, lse = attention(
        *(query, key, key),
        causal=True,
        window=100,
        alibi_slopes=torch.tensor([0.5]),
        return_lse=True,
        backend="cpu",
    )
    score = query[0, 0].double() @ row[0, 0, 0].double() * 8**-0.5
    distances = torch.logsumexp(-0.5 * torch.arange(100.0, dtype=torch.float64), 0)
    torch.testing.assert_close(lse[0, 0].double(), score + distances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["query", "key", "value"])
@pytest.mark.parametrize("length", [1, 20])
def test_half_precision_below_its_normal_numbers_is_read_where_denormals_are_flushed(
    layout, length, level
):
    tensors = {
        "query": torch.randn(1, 2, length, 33),
        "key": torch.randn(1, 1, 70, 33),
        "value": torch.randn(1, 1, 70, 33),
    }
    tensors[layout] *= 3e-6  # fp16 has no normal number below 6.1e-5
    query, key, value = (tensor.half() for tensor in tensors.values())
    scale = 1.0 if layout == "value" else 1e5
    exact = attention(query.double(), key.double(), value.double(), scale=scale)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        out = attention(query, key, value, scale=scale, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    # the output is rounded to what fp16 has: to 2^-24 at its smallest
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2**-24)


def test_2_to_the_31_keys_go_to_another_backend():
    row = torch.randn(1, 1, 1, 8)
    query, key = torch.randn(1, 1, 1, 8), row.expand(1, 1, 2**31, 8)  # a stride of 0: no memory
    explanation = explain(query, key, key, causal=True, window=100)
    assert explanation.chosen == "torch"
    assert explanation.verdicts[0].reason == "no kernel for more than 2,147,483,647 keys"
    out = attention(query, key, key, causal=True, window=100)
    torch.testing.assert_close(out, row)  # equal values, whatever their weights


@pytest.mark.parametrize("added", [LOWEST, -1e9, -1e7, -1e5, 1e6, 0.0])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_weights_sum_to_one_whatever_is_added_to_all_scores(backend, added):
    query, key, ones = (
        torch.randn(1, 2, 3, 16),
        torch.randn(1, 2, 130, 16),
        torch.ones(1, 2, 130, 16),
    )
    bias = torch.full((1, 1, 3, 130), added)
    out = attention(query, key, ones, bias=bias, backend=backend)
    torch.testing.assert_close(out, torch.ones(1, 2, 3, 16))
    weights = attention_weights(query, key, bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 3))
    if added == LOWEST:  # beside it no score counts
        torch.testing.assert_close(weights, torch.full((1, 2, 3, 130), 1 / 130))


@pytest.mark.parametrize("added", [LOWEST, -1e9, -1e4, -10.0])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_rows_that_a_bias_pushes_far_down_are_those_of_a_softmax(added, causal):
    # by PyTorch's own softmax, as eager attention has it; the first keys are padding
    tensors = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(1, 1, 1, 9)
    bias[..., :4] = added
    past = torch.ones(9, 9, dtype=torch.bool).tril() if causal else torch.ones(9, 9) > 0
    query, key, value = tensors
    score = (query @ key.mT * 8**-0.5 + bias).masked_fill(~past, -math.inf)
    expected = torch.softmax(score, -1) @ value
    out = attention(query, key, value, bias=bias, causal=causal)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    for given, one in zip(gradients, torch.autograd.grad((expected * weight).sum(), tensors)):
        torch.testing.assert_close(given, one, rtol=1e-4, atol=1e-5)


def test_gradients_beside_alibi_that_is_far_off_are_those_of_float64():
    # what every query sees lies at distances of 4,000
    shapes = ((1, 1, 3, 8), (1, 1, 4000, 8), (1, 1, 4000, 8))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    options = {
        "alibi_slopes": torch.tensor([50.0]),
        "mask": (torch.arange(4000) < 60).view(1, 1, 1, -1),
    }
    out = attention(*tensors, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = attention(*exact, **options, backend="reference")
    # scores of 2e5 are rounded by up to 2^-7 in float32; weights made from the lse are off by more
    given = torch.autograd.grad(out.square().sum(), tensors)
    right = torch.autograd.grad(expected.square().sum(), exact)
    for one, other in zip(given, right):
        assert (one.double() - other).norm() <= 3e-3 * other.norm()


def test_training_with_a_bias_goes_where_no_number_can_be_looked_at():
    def loss(query, key, value, bias):
        return attention(query, key, value, bias=bias).square().sum()

    batch = [torch.randn(3, 1, 2, 5, 8) for _ in range(3)]
    bias = torch.randn(3, 1, 1, 5, 5)
    given = torch.func.vmap(torch.func.grad(loss))(*batch, bias)
    for index, one in enumerate(given):
        tensors = [tensor[index].clone().requires_grad_() for tensor in batch]
        (expected,) = torch.autograd.grad(loss(*tensors, bias[index]), tensors[:1])
        torch.testing.assert_close(one, expected)
    meta = [torch.randn(1, 2, 5, 8, device="meta", requires_grad=True) for _ in range(3)]
    out = attention(*meta, bias=torch.zeros(1, 1, 5, 5, device="meta"))
    assert out.shape == (1, 2, 5, 8)
