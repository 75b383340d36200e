"""The torch backend gives what the reference gives, for every shape, option, layout and dtype."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import attention
from headwise.ops.attend import blocks, products
from ops.calls import Call, assert_agree, attention_calls
from rounding import relative_error

_sdpa = F.scaled_dot_product_attention


def watched_sdpa(query, key, value, **options):
    """SDPA, but never on its slow ways: grouped, or unfused for unequal head dims."""
    assert not options.get("enable_gqa")
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert query.shape[3] == key.shape[3] == value.shape[3]
    return _sdpa(query, key, value, **options)


@contextlib.contextmanager
def blocks_of(scores: int | None, rows: int | None = None, widened: int | None = None):
    """The torch backend with blocks so small that short calls take many."""
    with contextlib.ExitStack() as stack:
        for name, size in {"SCORES": scores, "ROWS": rows}.items():
            if size is not None:
                stack.enter_context(mock.patch.object(blocks, f"_BLOCK_{name}", size))
        if widened is not None:
            stack.enter_context(mock.patch.object(products, "_WIDEN", widened))
        yield


@settings(max_examples=400)
@given(
    call=attention_calls(),
    blocks=st.sampled_from([(None, None, None), (1, 1, 1), (40, 3, 20), (200, 2, 50)]),
)
def test_every_call_agrees_with_the_reference(call, blocks):
    with blocks_of(*blocks), mock.patch.object(F, "scaled_dot_product_attention", watched_sdpa):
        out = call.run(attention, backend="torch")
    assert_agree(out, call.run(attention, backend="reference"), call)


LONG = {
    "causal": {},
    "window": {"window": 300},
    "window, ALiBi": {"window": 300, "alibi_slopes": torch.tensor([0.01, 0.1, 0.02, 0.2])},
    "window, softcap": {"window": 300, "softcap": 1.0, "return_lse": True},
    "sinks": {"sinks": torch.tensor([0.5, -0.5, 1.0, 2.0]), "return_lse": True},
    "lengths": {"kv_lengths": torch.tensor([701]), "window": 65},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_a_call_of_several_real_blocks_agrees_with_the_reference(name, dtype):
    query = torch.randn(1, 4, 1100, 7, dtype=dtype)
    key, value = torch.randn(2, 1, 2, 1500, 7, dtype=dtype)
    call = Call({"query": query, "key": key, "value": value}, {"causal": True, **LONG[name]})
    assert query.shape[2] > 2 * blocks._BLOCK_ROWS
    assert_agree(
        call.run(attention, backend="torch"), call.run(attention, backend="reference"), call
    )


def test_bytes_between_the_heads_of_a_buffer_are_never_read():
    buffer = torch.full((2, 3, 64, 7), math.nan)
    buffer[:, :, :11] = torch.randn(2, 3, 11, 7)
    query, kv = torch.randn(2, 6, 5, 7), buffer[:, :, :11]
    expected = attention(query, kv.contiguous(), kv.contiguous(), causal=True)
    assert torch.equal(attention(query, kv, kv, causal=True), expected)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_square_causal_call_with_a_scale_of_0_or_less_hides_the_future(scale):
    # PyTorch's causal kernel multiplies its -inf by the scale
    query, key, value = torch.randn(3, 2, 3, 11, 7)
    call = Call({"query": query, "key": key, "value": value}, {"causal": True, "scale": scale})
    assert_agree(
        call.run(attention, backend="torch"), call.run(attention, backend="reference"), call
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"return_lse": True}], ids=["sdpa", "products"])
@pytest.mark.parametrize("length", [1, 17])
def test_half_precision_rounds_weights_and_output_alone(dtype, options, length):
    query = torch.randn(1, 8, length, 64, dtype=dtype)
    key, value = torch.randn(2, 1, 2, 512, 64, dtype=dtype)
    exact = attention(query.double(), key.double(), value.double(), backend="reference")
    ours = attention(query, key, value, backend="torch", **options)
    out = ours[0] if options else ours
    # weights and output are rounded to the dtype, by half an eps each
    assert relative_error(out, exact) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_the_lowest_finite_number_averages_as_the_reference(dtype):
    # a row of finfo.min is what stock models pass for padding rows: no NaN, an average
    query, key, value = torch.randn(3, 2, 3, 5, 7, dtype=dtype)
    bias = torch.zeros(1, 1, 5, 5, dtype=dtype)
    bias[:, :, 1] = torch.finfo(dtype).min
    out = attention(query, key, value, bias=bias, backend="torch")
    expected = value.float().mean(dim=2)
    tol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, :, 1].float(), expected, atol=tol, rtol=tol)


def test_results_do_not_alias_the_inputs():
    query, kv = torch.randn(1, 2, 3, 5), torch.randn(1, 1, 2, 5)
    copies = query.clone(), kv.clone()
    for kv_lengths in (None, torch.tensor([0])):
        attention(query, kv, kv, causal=True, kv_lengths=kv_lengths).fill_(7.0)
    assert torch.equal(query, copies[0])
    assert torch.equal(kv, copies[1])
