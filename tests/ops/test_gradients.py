"""Gradients of the torch backend: right by finite differences, and equal to the reference's."""

import math
from unittest import mock

import pytest
import torch

from headwise import attention
from headwise.ops.attend import blocks, products

BATCH, KV_HEADS, GROUP, QUERIES, CONTEXT, DIM = 2, 1, 3, 2, 5, 7
HEADS = KV_HEADS * GROUP


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def hidden_rows(*rows):
    """A mask under which these queries see nothing."""
    mask = torch.ones(1, 1, QUERIES, CONTEXT, dtype=torch.bool)
    mask[:, :, list(rows)] = False
    return mask


# Options by name, and the names of those that learn.
OPTIONS = {
    "nothing": ({}, ()),
    "causal": ({"causal": True}, ()),
    "scale": ({"scale": 0.7}, ()),
    "window": ({"causal": True, "window": 2}, ()),
    "sinks": ({"sinks": (HEADS,)}, ("sinks",)),
    "softcap": ({"softcap": 0.9}, ()),
    "ALiBi": ({"alibi_slopes": (HEADS,), "causal": True}, ("alibi_slopes",)),
    "bias": ({"bias": (1, HEADS, QUERIES, CONTEXT)}, ("bias",)),
    "bias and softcap": ({"bias": (BATCH, 1, 1, CONTEXT), "softcap": 0.9}, ("bias",)),
    "mask": ({"mask": draw(BATCH, HEADS, QUERIES, CONTEXT) > -0.5}, ()),
    "an empty row by mask": ({"mask": hidden_rows(1)}, ()),
    "an empty row with sinks": ({"mask": hidden_rows(0), "sinks": (HEADS,)}, ("sinks",)),
    "lengths": ({"kv_lengths": torch.tensor([3, 5])}, ()),
    "a length of 0": ({"kv_lengths": torch.tensor([0, 4]), "causal": True}, ()),
    "a length of 1": ({"kv_lengths": torch.tensor([5, 1]), "causal": True, "softcap": 0.9}, ()),
}


def inputs_of(name):
    """[query, key, value, learned options..] with gradients, and the function of them."""
    options, learned = OPTIONS[name]
    tensors = [draw(BATCH, HEADS, QUERIES, DIM)]
    tensors += [draw(BATCH, KV_HEADS, CONTEXT, DIM), draw(BATCH, KV_HEADS, CONTEXT, DIM)]
    tensors += [draw(*options[key]) for key in learned]
    fixed = {key: value for key, value in options.items() if key not in learned}

    def run(*tensors, backend="torch", **more):
        return attention(
            *tensors[:3], **fixed, **dict(zip(learned, tensors[3:])), **more, backend=backend
        )

    return [tensor.requires_grad_() for tensor in tensors], run


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_finite_differences(name):
    tensors, run = inputs_of(name)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def out_and_finite_lse(*tensors, run):
    out, lse = run(*tensors, return_lse=True)
    return out, lse.masked_fill(lse == -math.inf, 0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_through_the_lse_are_those_of_finite_differences(name):
    tensors, run = inputs_of(name)
    assert torch.autograd.gradcheck(
        lambda *t: out_and_finite_lse(*t, run=run), tensors, fast_mode=True
    )


@pytest.mark.parametrize("rows_per_block", [1, 512])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_equal_the_reference(name, return_lse, rows_per_block):
    tensors, run = inputs_of(name)
    weight = draw(BATCH, HEADS, QUERIES, DIM)

    def gradients(backend):
        if return_lse:
            out, lse = out_and_finite_lse(
                *tensors, run=lambda *t, **m: run(*t, **m, backend=backend)
            )
            return torch.autograd.grad((out * weight).sum() + lse.square().sum(), tensors)
        return torch.autograd.grad((run(*tensors, backend=backend) * weight).sum(), tensors)

    with mock.patch.object(blocks, "_BLOCK_ROWS", rows_per_block):
        given = gradients("torch")
    for one, other in zip(given, gradients("reference"), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_hidden_by_a_bias_of_minus_infinity_has_no_nan_gradient(dtype, return_lse, backend):
    query = torch.randn(BATCH, HEADS, QUERIES, DIM, dtype=dtype, requires_grad=True)
    kv = torch.randn(BATCH, KV_HEADS, CONTEXT, DIM, dtype=dtype, requires_grad=True)
    bias = torch.zeros(1, 1, QUERIES, CONTEXT, dtype=dtype)
    bias[:, :, 0] = -math.inf
    bias.requires_grad_()
    result = attention(query, kv, kv, bias=bias, return_lse=return_lse, backend=backend)
    loss = result[1][:, :, 1].sum() + result[0].sum() if return_lse else result.sum()
    for gradient in torch.autograd.grad(loss, (query, kv, bias)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_batch_that_sees_nothing_at_all_can_be_trained_through(backend):
    query = draw(BATCH, HEADS, QUERIES, DIM).requires_grad_()
    kv, none = draw(BATCH, KV_HEADS, CONTEXT, DIM), torch.zeros(BATCH, dtype=torch.int64)
    attention(query, kv, kv, kv_lengths=none, backend=backend).sum().backward()
    assert (query.grad == 0).all()


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 5.0}], ids=["sdpa", "products"])
def test_key_bytes_past_a_length_do_not_reach_the_gradients(options):
    query = draw(BATCH, HEADS, QUERIES, DIM).requires_grad_()
    kv = draw(BATCH, KV_HEADS, CONTEXT, DIM)
    kv[0, :, 3:] = math.nan
    kv.requires_grad_()
    out = attention(query, kv, kv, kv_lengths=torch.tensor([3, 5]), **options)
    gradients = torch.autograd.grad(out.square().sum(), (query, kv))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][0, :, 3:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"return_lse": True}], ids=["sdpa", "products"])
def test_half_precision_gradients_are_right_whatever_the_size_of_a_widened_part(options):
    query = torch.randn(1, 4, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    kv = torch.randn(1, 2, 11, 8, dtype=torch.bfloat16, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (query, kv)]
    with mock.patch.object(products, "_WIDEN", 16):
        out = attention(query, kv, kv, **options)
    out = out[0] if options else out
    given = torch.autograd.grad(out.sum(), (query, kv))
    expected = torch.autograd.grad(
        attention(exact[0], exact[1], exact[1], backend="reference").sum(), exact
    )
    for one, other in zip(given, expected, strict=True):
        # weights and gradients are rounded to bfloat16, L terms add up
        tol = 4 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(one.double(), other, atol=tol * other.abs().max(), rtol=tol)
