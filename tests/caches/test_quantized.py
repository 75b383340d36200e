"""The quantised cache: what a token costs, how much is rounded away, and what it refuses."""

import copy
import pickle
import re

import pytest
import torch

from headwise import CapacityError, ShapeError, UnsupportedError, attention, latent_attention
from headwise.caches import ContiguousCache, QuantizedCache
from headwise.ops import dequantize, quantize, rotate

B, H, K, D, V = 2, 6, 3, 10, 38
# a byte an element and a scale of 4 a row; half a byte, and a scale for 32 elements: 1 and 2 a row
BYTES = {8: D + 4 + V + 4, 4: D // 2 + 4 + V // 2 + 8}


def tokens(count, batch=B, dtype=torch.float32):
    return torch.randn(batch, K, count, D).to(dtype), torch.randn(batch, K, count, V).to(dtype)


def filled(count, bits):
    cache, held = QuantizedCache(bits), tokens(count)
    cache.append(*held)
    return cache, held


def state(cache):
    view = cache.view
    return [side.clone() for side in (view.key, view.key_scales, view.value, view.value_scales)]


def assert_same(cache, expected):
    for given, side in zip(state(cache), expected, strict=True):
        assert torch.equal(given, side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_costs_its_integers_and_its_scales_to_the_byte(bits, dtype):
    cache = QuantizedCache(bits)
    for count in (17, 1, 5):
        before = cache.nbytes
        cache.append(*tokens(count, dtype=dtype))
        assert cache.nbytes - before == B * K * count * BYTES[bits]
    cache.crop(4)
    assert cache.nbytes == B * K * 4 * BYTES[bits]
    view = cache.view
    parts = (view.key, view.key_scales, view.value, view.value_scales)
    assert cache.nbytes == sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize(("bits", "bytes_of_a_row"), [(8, 128 + 4), (4, 64 + 16)])
def test_a_head_of_128_in_bytes(bits, bytes_of_a_row):
    cache = QuantizedCache(bits)
    cache.append(torch.zeros(1, 8, 1000, 128), torch.zeros(1, 8, 1000, 128))
    assert cache.nbytes == 1000 * 8 * 2 * bytes_of_a_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_in_8_bits_no_element_is_off_by_more_than_half_a_scale(size, dtype):
    row = (torch.randn(97, D) * size).to(dtype)
    integers, scales = quantize(row, 8)
    assert torch.equal(scales[:, 0], row.float().abs().amax(1) / 127)
    error = (dequantize(integers, scales, 8) - row.float()).abs()
    assert (error <= 0.5001 * scales).all()
    # what is largest is exact, up to the rounding of its scale
    largest = row.float().abs().argmax(1, keepdim=True)
    assert (error.gather(1, largest) <= 1e-6 * row.float().abs().gather(1, largest)).all()


@pytest.mark.parametrize("dim", [6, 32, 38, 64, 96])
def test_in_4_bits_a_group_is_rounded_better_than_to_its_largest_element(dim):
    row = torch.randn(97, dim)
    integers, scales = quantize(row, 4)
    assert integers.shape == (97, dim // 2)
    assert scales.shape == (97, (dim + 31) // 32)
    group = torch.nn.functional.pad(rotate(row), (0, -dim % 32)).unflatten(1, (-1, 32))
    plain_scales = group.abs().amax(2, keepdim=True) / 7
    plain = (group / plain_scales).round() * plain_scales
    given = rotate(dequantize(integers, scales, 4))
    given = torch.nn.functional.pad(given, (0, -dim % 32)).unflatten(1, (-1, 32))
    errors = [(side - group).square().sum(2) for side in (given, plain)]
    assert (errors[0] <= 1.0001 * errors[1]).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()
    # what is not beyond the outermost level is off by at most half a scale
    inside = (group.abs() <= 7 * scales.abs().unsqueeze(2)) | (given.abs() < group.abs() * 0.5)
    assert ((given - group).abs() <= 0.5001 * scales.abs().unsqueeze(2))[inside].all()


def test_in_4_bits_a_channel_that_stands_out_does_not_drown_the_others():
    row = torch.randn(97, 64)
    row[:, 5] *= 30
    integers, scales = quantize(row, 4)
    error = (dequantize(integers, scales, 4) - row).pow(2).mean().sqrt()
    # without the rotation the scale of the channel's group of 32 would be the channel's
    group = row.unflatten(1, (2, 32))
    plain_scales = group.abs().amax(2, keepdim=True) / 7
    plain = ((group / plain_scales).round() * plain_scales - group).pow(2).mean().sqrt()
    assert error < 0.7 * plain


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits):
    rows = torch.randn(5, V)
    rows[2] = 0.0
    integers, scales = quantize(rows, bits)
    given = dequantize(integers, scales, bits)
    assert (given[2] == 0).all()
    assert (scales[2] == 0).all()
    assert given.isfinite().all()


@pytest.mark.parametrize("dim", [1, 2, 10, 12, 64, 96, 128, 576])
def test_a_rotation_is_its_own_inverse_and_keeps_products(dim):
    query, key = torch.randn(13, dim), torch.randn(13, dim)
    torch.testing.assert_close(rotate(rotate(key)), key)
    torch.testing.assert_close((rotate(query) * rotate(key)).sum(1), (query * key).sum(1))
    if dim % 2 == 0:
        assert not torch.allclose(rotate(key), key, atol=0.1)


# The kernel rounds queries and weights to 16 bits where it multiplies int8.
CLOSE = {"cpu": 2**-12, "torch": 1e-5, "reference": 1e-5}


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("length", [1, 4, 23])
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_over_it_is_that_over_the_rounded_rows(bits, length, backend):
    cache, held = filled(23, bits)
    query = torch.randn(B, H, length, D)
    given = attention(query, kv=cache.view, causal=True, backend=backend)
    key, value = (dequantize(*quantize(side, bits), bits) for side in held)
    expected = attention(query, key, value, causal=True, backend="reference")
    torch.testing.assert_close(given, expected, atol=CLOSE[backend], rtol=1e-5)


@pytest.mark.parametrize("paradigm", ["absorbed", "expanded"])
@pytest.mark.parametrize("bits", [8, 4])
def test_latents_and_rope_keys_are_rounded_too(bits, paradigm):
    rank, rope, nope = 12, 4, 6
    held = torch.randn(B, 1, 21, rank), torch.randn(B, 1, 21, rope)
    view = QuantizedCache(bits).append(*held)
    query = torch.randn(B, H, 2, nope), torch.randn(B, H, 2, rope)
    weights = torch.randn(H, nope, rank), torch.randn(H, V, rank)
    options = {"causal": True, "paradigm": paradigm}
    given = latent_attention(*query, w_uk=weights[0], w_uv=weights[1], kv=view, **options)
    options["backend"] = "reference"
    rounded = (dequantize(*quantize(side, bits), bits)[:, 0] for side in held)
    expected = latent_attention(*query, *rounded, *weights, **options)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_held_is_not_rounded_again(bits):
    cache, _ = filled(5, bits)
    before = state(cache)
    for _ in range(40):
        cache.append(*tokens(1))
        cache.reorder(torch.tensor([1, 0]))
    cache.crop(5)
    assert_same(cache, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_filled_under_inference_mode_it_works_on_outside(bits):
    with torch.inference_mode():
        cache, held = filled(5, bits)
        cache.select(torch.tensor([1, 0]))
    new = tokens(30)
    view = cache.append(*new)
    expected = quantize(torch.cat([held[0][[1, 0]], new[0]], dim=2), bits)
    assert not view.key.is_inference()
    assert torch.equal(view.key_scales, expected[1])
    query = torch.randn(B, H, 1, D, requires_grad=True)
    # what it holds can stand in a graph, as a constant
    attention(query, kv=cache.view).sum().backward()
    assert query.grad.isfinite().all()


def test_rotated_under_inference_mode_the_matrix_serves_outside():
    dim = 2**9  # of no other test
    with torch.inference_mode():
        rotate(torch.randn(1, dim))
    row = torch.randn(1, dim, requires_grad=True)
    rotate(row).sum().backward()
    assert row.grad.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_lives_on_its_own(duplicate, bits):
    cache, _ = filled(5, bits)
    before, twin = state(cache), duplicate(cache)
    twin.append(*tokens(1))
    twin.view.key.zero_()
    assert (cache.length, twin.length) == (5, 6)
    assert_same(cache, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_growth_that_fails_half_way_changes_nothing(bits, monkeypatch):
    cache, _ = filled(5, bits)
    before, nbytes = state(cache), cache.nbytes
    append = ContiguousCache.append

    def no_scales(self, first, second):
        if first.dtype == torch.float32:
            raise CapacityError("the cache needs more than there is")
        return append(self, first, second)

    monkeypatch.setattr(ContiguousCache, "append", no_scales)
    with pytest.raises(CapacityError):
        cache.append(*tokens(3))
    assert (cache.length, cache.nbytes) == (5, nbytes)
    assert_same(cache, before)
    monkeypatch.undo()
    cache.append(*tokens(3))
    cache.crop(5)
    assert_same(cache, before)


def test_a_first_append_that_fails_half_way_leaves_an_empty_cache(monkeypatch):
    cache, append = QuantizedCache(8), ContiguousCache.append

    def no_scales(self, first, second):
        if first.dtype == torch.float32:
            raise CapacityError("the cache needs more than there is")
        return append(self, first, second)

    monkeypatch.setattr(ContiguousCache, "append", no_scales)
    with pytest.raises(CapacityError):
        cache.append(*tokens(3))
    monkeypatch.undo()
    assert (cache.length, cache.reserved_bytes, cache.view) == (0, 0, None)
    cache.append(*tokens(3, batch=5))
    assert cache.view.shape == (5, K, 3, D, V)


def test_a_selection_that_fails_half_way_changes_nothing(monkeypatch):
    cache, _ = filled(5, 8)
    before, select = state(cache), ContiguousCache.select

    def no_scales(self, index):
        if self.first.dtype == torch.float32:
            raise CapacityError("the cache needs more than there is")
        select(self, index)

    monkeypatch.setattr(ContiguousCache, "select", no_scales)
    with pytest.raises(CapacityError):
        cache.select(torch.tensor([1, 0, 1]))
    assert_same(cache, before)


def test_an_empty_cache():
    cache = QuantizedCache()
    assert cache.view is None
    assert cache.length == cache.held == cache.nbytes == cache.reserved_bytes == 0
    cache.crop(0)
    cache.select(torch.tensor([3]))
    cache.reset()
    cache.to("cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_after_a_reset_anything_fits(bits):
    cache, _ = filled(5, bits)
    cache.reset()
    assert cache.reserved_bytes == 0
    cache.append(torch.ones(5, 2, 1, 4).half(), torch.ones(5, 2, 1, 6).half())
    assert cache.view.shape == (5, 2, 1, 4, 6)


@pytest.mark.parametrize("bits", [2, 16, 8.5, "8", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ShapeError, match=f"^bits is {bits!r}, expected 4 or 8$"):
        QuantizedCache(bits)


def test_odd_rows_are_refused_in_4_bits():
    cache = QuantizedCache(4)
    message = "^rows of 7 elements, expected an even number in 4 bits$"
    with pytest.raises(ShapeError, match=message):
        cache.append(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 7))
    assert (cache.length, cache.view) == (0, None)
    QuantizedCache(8).append(torch.zeros(1, 1, 1, 7), torch.zeros(1, 1, 1, 7))


BAD_CALLS = {
    "no tensors": (lambda c: c.append(None, None), "first is a NoneType, expected a tensor"),
    "another batch": (lambda c: c.append(*tokens(1, 3)), "tokens have batch, heads, dim [3, 3, "),
    "another dtype": (
        lambda c: c.append(*tokens(1, dtype=torch.float16)),
        "dims and dtype (10, 38, torch.float16), the cache holds (10, 38, torch.float32)",
    ),
    "crop of more": (lambda c: c.crop(6), "crop to 6 tokens, expected 0 to 5, those held"),
    "select of what is not there": (
        lambda c: c.select(torch.tensor([0, 2])),
        "index runs from 0 to 2, expected 0 to 1, those held",
    ),
    "reorder to another batch": (
        lambda c: c.reorder(torch.tensor([0])),
        "index has shape [1], expected [2], one per sequence held",
    ),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(name, bits):
    call, message = BAD_CALLS[name]
    cache, _ = filled(5, bits)
    before = state(cache)
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        call(cache)
    assert "\n" not in str(caught.value)
    assert_same(cache, before)


def test_tokens_that_need_gradients_are_refused():
    cache, (first, second) = QuantizedCache(), tokens(1)
    with pytest.raises(UnsupportedError, match=r"^second needs gradients"):
        cache.append(first, second.requires_grad_())
    assert cache.view is None
