"""Keys and values in pages and as integers, read in place: what two tensors of the same give."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import headwise
from headwise import PagedKV, QuantKV, ShapeError, attention, latent_attention
from headwise.ops import (
    attention_weights,
    dequantize,
    explain,
    explain_problem,
    quantize,
)
from headwise.ops.attend.operator import make_call
from headwise.ops.backend import cpu, cpu_library
from headwise.ops.integers import rounding
from ops.calls import attention_calls

assert cpu.available()[0], cpu.available()[1]
LEVELS = list(range(torch.ops.headwise.best_level() + 1))
# int8 is multiplied with queries and weights of 16 bits
SHORT = 2**-11


def in_pages(key, value, size, lengths=None, order=None):
    """A view over shuffled pages of a pool, whatever holds no token NaN, or an integer."""
    batch, heads, context, _ = key.shape
    each = -(-context // size)
    if order is None:
        order = torch.randperm(batch * each + 3)[: batch * each].view(batch, each)
    pools = []
    for rows in (key, value):
        waste = math.nan if rows.is_floating_point() else 77
        pool = rows.new_full((heads, batch * each + 3, size, rows.shape[3]), waste)
        padded = rows.new_full((batch, heads, each * size, rows.shape[3]), waste)
        padded[:, :, :context] = rows
        pool[:, order] = padded.unflatten(2, (each, size)).transpose(0, 1)
        pools.append(pool.transpose(0, 1))
    return PagedKV(
        key=pools[0],
        value=pools[1],
        page_table=order.int(),
        context=context,
        lengths=lengths,
    )


def as_integers(key, value, bits):
    first, second = quantize(key, bits), quantize(value, bits)
    return QuantKV(
        key=first[0], key_scales=first[1], value=second[0], value_scales=second[1], bits=bits
    )


def in_integer_pages(kv, size, lengths=None):
    """The same integers and scales in shuffled pages; what holds no token is no number."""
    rows = in_pages(kv.key, kv.value, size, lengths)
    scales = in_pages(kv.key_scales, kv.value_scales, size, order=rows.page_table)
    return QuantKV(
        key=rows.key,
        key_scales=scales.key,
        value=rows.value,
        value_scales=scales.value,
        bits=kv.bits,
        page_table=rows.page_table,
        context=rows.context,
        lengths=lengths,
    )


@given(call=attention_calls(), level=st.sampled_from(LEVELS), size=st.sampled_from([1, 2, 8]))
def test_pages_give_what_one_buffer_gives_to_the_bit(call, level, size):
    options = dict(call.options)
    lengths = options.pop("kv_lengths", None)
    query, key, value = (tensor.contiguous() for tensor in call.tensors.values())
    if lengths is not None:  # gathered pages are zero past a length
        held = torch.arange(key.shape[2]) < lengths[:, None]
        key, value = (rows.masked_fill(~held[:, None, :, None], 0.0) for rows in (key, value))
    view = in_pages(key, value, size, lengths)
    with mock.patch.object(cpu_library, "_level", level):
        for backend in ("cpu", "torch", "reference"):
            if backend == "cpu" and query.dtype == torch.float64:
                continue
            options["backend"] = backend
            expected = attention(query, key, value, kv_lengths=lengths, **options)
            found = attention(query, kv=view, **options)
            pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
            for one, other in pairs:
                if backend == "cpu":
                    assert torch.equal(one, other)
                else:  # PyTorch's products may differ in the last bit for other strides
                    eps = torch.finfo(query.dtype).eps
                    torch.testing.assert_close(one, other, atol=32 * eps, rtol=8 * eps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "context", "dim", "value_dim"),
    [
        (4, 4, 1, 300, 64, 64),
        (6, 2, 1, 65, 80, 34),
        (8, 2, 3, 129, 128, 128),
        (32, 1, 1, 300, 96, 96),
        (4, 2, 40, 200, 64, 32),
    ],
)
def test_integers_give_what_they_stand_for(
    heads, kv_heads, length, context, dim, value_dim, bits, level
):
    torch.manual_seed(bits)
    query = torch.randn(2, heads, length, dim)
    key, value = (
        torch.randn(2, kv_heads, context, dim),
        torch.randn(2, kv_heads, context, value_dim),
    )
    view = as_integers(key, value, bits)
    rounded = view.dense(torch.float32)
    lengths = torch.tensor([context, context // 3])
    for scales in (view.key_scales, view.value_scales):
        scales[1, :, context // 3 :] = math.nan
    window = context // 2
    options = {
        "causal": True,
        "window": window,
        "kv_lengths": lengths,
        "softcap": 3.0,
        "sinks": torch.randn(heads),
        "alibi_slopes": torch.rand(heads) / 50,
        "mask": torch.rand(1, 1, length, context) < 0.8,
        "bias": torch.randn(1, heads, 1, context),
        "return_lse": True,
    }
    with mock.patch.object(cpu_library, "_level", level):
        found = attention(query, kv=view, backend="cpu", **options)
    expected = attention(query, *rounded, backend="reference", **options)
    close = SHORT if bits == 8 else 2e-5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=close, rtol=close)


@given(
    call=attention_calls(),
    level=st.sampled_from(LEVELS),
    size=st.sampled_from([1, 2, 8, 64]),
    bits=st.sampled_from([8, 4]),
)
def test_integers_in_pages_give_what_one_buffer_gives_to_the_bit(call, level, size, bits):
    options = dict(call.options)
    lengths = options.pop("kv_lengths", None)
    query, key, value = (tensor.contiguous() for tensor in call.tensors.values())
    if bits == 4:
        assume(key.shape[3] % 2 == value.shape[3] % 2 == 0)
    if lengths is not None:  # rows past a length are NaN, of which no integers are made
        held = torch.arange(key.shape[2]) < lengths[:, None]
        key, value = (rows.masked_fill(~held[:, None, :, None], 0.0) for rows in (key, value))
    one_buffer = as_integers(key, value, bits)
    view = in_integer_pages(one_buffer, size, lengths)
    assert (view.shape, view.layout) == (one_buffer.shape, f"paged int{bits}")
    # rotating back adds in an order that depends on how many rows there are
    for one, other in zip(view.dense(torch.float32), one_buffer.dense(torch.float32)):
        torch.testing.assert_close(one, other, atol=1e-5 if bits == 4 else 0, rtol=0)
    with mock.patch.object(cpu_library, "_level", level):
        for backend in ("cpu", "torch", "reference"):
            if backend == "cpu" and query.dtype == torch.float64:
                continue
            options["backend"] = backend
            expected = attention(query, kv=one_buffer, kv_lengths=lengths, **options)
            found = attention(query, kv=view, **options)
            pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
            for one, other in pairs:
                if backend == "cpu":
                    assert torch.equal(one, other)
                else:  # as PyTorch's products may, and the rows that were rotated back in float32
                    eps = max(torch.finfo(dtype).eps for dtype in (query.dtype, torch.float32))
                    torch.testing.assert_close(one, other, atol=32 * eps, rtol=8 * eps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length"), [(4, 4, 1), (6, 2, 1), (8, 1, 3), (32, 1, 1), (4, 2, 40)]
)
def test_integers_in_pages_give_what_they_stand_for(heads, kv_heads, length, page, bits, level):
    context, dim, value_dim = 165, 80, 34
    query = torch.randn(2, heads, length, dim)
    rows = (torch.randn(2, kv_heads, context, size) for size in (dim, value_dim))
    lengths = torch.tensor([context, context // 3])
    view = in_integer_pages(as_integers(*rows, bits), page, lengths)
    options = {
        "causal": True,
        "window": context // 2,
        "softcap": 3.0,
        "sinks": torch.randn(heads),
        "return_lse": True,
    }
    chosen = torch.randint(-1, context, (2, kv_heads, length, 60), dtype=torch.int32)
    close = SHORT if bits == 8 else 2e-5
    for also in ({"bias": torch.randn(1, heads, 1, context)}, {"indices": chosen}):
        with mock.patch.object(cpu_library, "_level", level):
            found = attention(query, kv=view, backend="cpu", **options, **also)
        dense = view.dense(torch.float32)
        options_of = {**options, **also, "kv_lengths": lengths, "backend": "reference"}
        expected = attention(query, *dense, **options_of)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=close, rtol=close)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("paradigm", ["absorbed", "expanded", "auto"])
@pytest.mark.parametrize("layout", ["paged", "int8", "int4", "paged int8", "paged int4"])
@pytest.mark.parametrize("nope", [24, 0])
def test_latents_in_pages_and_as_integers(nope, layout, paradigm, level):
    torch.manual_seed(0)
    heads, rank, rope, out = 4, 64, 16, 20
    latent, key_rope = torch.randn(2, 1, 130, rank), torch.randn(2, 1, 130, rope)
    query = torch.randn(2, heads, 2, nope), torch.randn(2, heads, 2, rope)
    weights = {"w_uk": torch.randn(heads, nope, rank), "w_uv": torch.randn(heads, out, rank)}
    if layout == "paged":
        view = in_pages(latent, key_rope, 16)
    else:
        view = as_integers(latent, key_rope, int(layout[-1]))
        if layout.startswith("paged"):
            view = in_integer_pages(view, 16)
    held = [rows[:, 0] for rows in view.dense(torch.float32)]
    options = {"paradigm": paradigm, "causal": True, "return_lse": True}
    with mock.patch.object(cpu_library, "_level", level):
        found = latent_attention(*query, kv=view, **weights, **options)
    expected = latent_attention(*query, *held, **weights, **options, backend="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=2e-4)


def test_the_weights_of_a_view_are_those_of_its_keys():
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 20, 16)
    view = in_pages(key, key, 8)
    expected = attention_weights(query, key, causal=True)
    assert torch.equal(attention_weights(query, kv=view, causal=True), expected)


def test_the_explanation_says_what_is_done_with_a_view():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 20, 16)
    words = str(explain(query, kv=in_pages(key, key, 8)))
    assert "paged in place" in words
    assert words.count("pages gathered first") == 2
    words = str(explain(query, kv=as_integers(key, key, 4)))
    assert "int4 in place" in words
    assert words.count("int4 dequantised first") == 2
    words = str(explain(query, kv=in_integer_pages(as_integers(key, key, 8), 8)))
    assert "paged int8 in place" in words
    assert words.count("paged int8 dequantised first") == 2
    with pytest.raises(ShapeError, match="bits is 5, expected 4 or 8"):
        quantize(key, 5)
    wide = make_call(
        torch.randn(1, 1, 1, 600), None, None, kv=in_pages(*[torch.randn(1, 1, 3, 600)] * 2, 4)
    )
    assert explain_problem(wide.problem()).chosen == "torch"


def test_the_operators_pass_opcheck():
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 70, 16)
    rest = (torch.tensor([3, 70]), 0.25, True, 0)
    rest += (True, 5, 2.0, torch.randn(4), torch.rand(4), torch.randn(1, 1, 1, 70))
    rest += (torch.ones(2, 1, 3, 70, dtype=torch.bool),)
    ops, view = torch.ops.headwise, in_pages(key, key, 16)
    pages = (view.page_table, 70, None, None, None)
    arguments = (query, view.key, view.value, None, None, *pages, *rest)
    torch.library.opcheck(ops.attend.default, arguments)
    for bits in (8, 4):
        one_buffer = as_integers(key, key, bits)
        for kv in (one_buffer, in_integer_pages(one_buffer, 16)):
            scales = (kv.page_table, kv.context, kv.key_scales, kv.value_scales, None)
            arguments = (query, kv.key, kv.value, None, None, *scales, *rest)
            torch.library.opcheck(ops.attend.default, arguments)
        torch.library.opcheck(ops.quantize.default, (key, bits, 0))


def test_views_compile_whole():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16)
    pages, integers = in_pages(key, key, 16), as_integers(key, key, 8)
    both_of_them = in_integer_pages(integers, 16)

    def both(query):
        first = attention(
            query,
            kv=PagedKV(key=pages.key, value=pages.value, page_table=pages.page_table, context=40),
            causal=True,
        )
        kv = QuantKV(
            key=both_of_them.key,
            key_scales=both_of_them.key_scales,
            value=both_of_them.value,
            value_scales=both_of_them.value_scales,
            bits=8,
            page_table=both_of_them.page_table,
            context=40,
        )
        second = attention(query, kv=integers, causal=True)
        return first, second, attention(query, kv=kv, causal=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(query), both(query), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [2, 30, 32, 34, 64, 80, 512])
def test_the_kernel_rounds_as_pytorch_does(dim, bits, dtype, level):
    rows = torch.randn(3, 2, 33, dim)
    rows[..., 0] *= 9
    rows[1, 1, 5] = 0
    rows = rows.to(dtype)
    with mock.patch.object(cpu_library, "_level", level):
        integers, scales = quantize(rows.transpose(0, 1), bits)
    expected = rounding.quantize(rows.transpose(0, 1), bits)
    # the sums of a rotation are in another order: an element may lie on the edge of two integers,
    # and two scales may be as good
    wrong = dequantize(integers, scales, bits) - dequantize(*expected, bits)
    assert wrong.norm() <= (0 if bits == 8 else 0.01) * rows.float().norm()
    error = (dequantize(integers, scales, bits) - rows.transpose(0, 1).float()).norm()
    torch_error = (dequantize(*expected, bits) - rows.transpose(0, 1).float()).norm()
    assert error <= 1.0001 * torch_error + 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dim", [512, 528, 576])
@pytest.mark.parametrize("most", [127, -128])
def test_the_largest_integers_of_the_widest_heads_add_up(dim, most, level):
    rows = torch.full((1, 1, 4, dim), most, dtype=torch.int8)
    scales = torch.full((1, 1, 4, 1), 1 / 128)
    kv = QuantKV(key=rows, key_scales=scales, value=rows, value_scales=scales, bits=8)
    query = torch.ones(1, 1, 1, dim)
    with mock.patch.object(cpu_library, "_level", level):
        out, lse = attention(query, kv=kv, return_lse=True, backend="cpu")
    expected = attention(query, kv=kv, return_lse=True, backend="reference")
    torch.testing.assert_close((out, lse), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_stays_none(where, bits, level):
    tensors = {"query": torch.randn(1, 2, 1, 64)}
    tensors |= {name: torch.randn(1, 2, 70, 64) for name in ("key", "value")}
    tensors[where][0, 1, -1, 3] = math.nan
    with mock.patch.object(cpu_library, "_level", level):
        view = as_integers(tensors["key"], tensors["value"], bits)
        out = attention(tensors["query"], kv=view, backend="cpu")
    assert out[0, 1].isnan().all() or (where == "value" and out[0, 1].isnan().any())
    assert out[0, 0].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e21, 1e-10, 1e-42])
def test_rows_of_any_size_are_rounded(size, bits, level):
    rows = torch.randn(1, 1, 5, 64) * size
    with mock.patch.object(cpu_library, "_level", level):
        back = dequantize(*quantize(rows, bits), bits=bits)
    error = (back / size - rows / size).norm() / (rows / size).norm()
    assert error < (0.1 if size > 1e-30 else 1.01)
    assert quantize(torch.empty(0, 64), bits)[0].shape == (0, 64 * bits // 8)
    assert quantize(torch.full((1, 1, 1, 64), math.nan), bits)[1].isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_values_that_share_the_integers_of_keys_have_their_own_scales(bits):
    integers, scales = quantize(torch.randn(1, 1, 70, 64), bits)
    kv = QuantKV(
        key=integers, key_scales=scales, value=integers, value_scales=3 * scales, bits=bits
    )
    query = torch.randn(1, 16, 4, 64)
    expected = attention(query, kv=kv, backend="reference")
    torch.testing.assert_close(attention(query, kv=kv, backend="cpu"), expected, atol=1e-4, rtol=0)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


TABLE = torch.tensor([[0, 1]], dtype=torch.int32)
PAGED = {"key": ones(3, 2, 8, 16), "value": ones(3, 2, 8, 4), "page_table": TABLE, "context": 9}
QUANT = {
    "key": ones(1, 2, 9, 16, dtype=torch.int8),
    "key_scales": ones(1, 2, 9, 1),
    "value": ones(1, 2, 9, 4, dtype=torch.int8),
    "value_scales": ones(1, 2, 9, 1),
    "bits": 8,
}

# QUANT in pages
PAGES = {
    "key": ones(3, 2, 8, 16, dtype=torch.int8),
    "key_scales": ones(3, 2, 8, 1),
    "value": ones(3, 2, 8, 4, dtype=torch.int8),
    "value_scales": ones(3, 2, 8, 1),
    "page_table": TABLE,
    "context": 9,
}


@pytest.mark.parametrize(
    ("view", "changes", "message"),
    [
        (PagedKV, {"key": ones(3, 2, 8)}, "kv.key has shape [3, 2, 8]"),
        (PagedKV, {"value": ones(3, 2, 8, 4).half()}, "kv.value has shape [3, 2, 8, 4] and dtype"),
        (PagedKV, {"value": ones(4, 2, 8, 4)}, "kv.value has shape [4, 2, 8, 4], expected"),
        (PagedKV, {"key": ones(3, 2, 6, 16), "value": ones(3, 2, 6, 4)}, "pages hold 6 tokens"),
        (PagedKV, {"page_table": TABLE.long()}, "kv.page_table has shape [1, 2] and dtype"),
        (PagedKV, {"context": 17}, "kv.context is 17, expected 0 to 16"),
        (PagedKV, {"context": -1}, "kv.context is -1"),
        (PagedKV, {"page_table": TABLE + 2}, "page"),
        (PagedKV, {"page_table": TABLE - 1}, "page"),
        (PagedKV, {"page_table": TABLE.repeat(2, 1)}, "expected [B, K, L, D] with B=1"),
        (PagedKV, {"lengths": torch.tensor([10])}, "kv_lengths run from 10 to 10"),
        (QuantKV, {"bits": 5}, "kv.bits is 5, expected 4 or 8"),
        (QuantKV, {"key": ones(1, 2, 9, 16)}, "kv.key has shape [1, 2, 9, 16] and dtype"),
        (
            QuantKV,
            {"key_scales": ones(1, 2, 9, 2)},
            "kv.key has shape [1, 2, 9, 16] and its scales",
        ),
        (QuantKV, {"value": ones(1, 2, 8, 4, dtype=torch.int8)}, "kv.value has shape [1, 2, 8, 4]"),
        (QuantKV, {"key": ones(1, 2, 9, 8, dtype=torch.int8)}, "expected [B, K, L, D] with B=1"),
        (QuantKV, {"context": 9}, "kv.context and kv.lengths are for pages"),
        (QuantKV, {"lengths": torch.tensor([9])}, "kv.context and kv.lengths are for pages"),
        (QuantKV, {**PAGES, "page_table": TABLE.long()}, "kv.page_table has shape [1, 2] and"),
        (QuantKV, {**PAGES, "context": 17}, "kv.context is 17, expected 0 to 16"),
        (QuantKV, {**PAGES, "page_table": TABLE + 2}, "names pages 2 to 3, expected 0 to 2"),
        (QuantKV, {**PAGES, "page_table": TABLE - 1}, "names pages -1 to 0, expected 0 to 2"),
        (QuantKV, {**PAGES, "key_scales": ones(3, 2, 9, 1)}, "and its scales [3, 2, 9, 1]"),
        (QuantKV, {**PAGES, "lengths": torch.tensor([10])}, "kv_lengths run from 10 to 10"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_bad_view_is_refused_in_one_line(view, changes, message, backend):
    kv = view(**{**(PAGED if view is PagedKV else QUANT), **changes})
    with pytest.raises(ShapeError) as caught:
        attention(ones(1, 4, 1, 16), kv=kv, causal=True, backend=backend)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_view_stands_for_both_tensors():
    query, key = ones(1, 4, 1, 16), ones(1, 2, 9, 16)
    kv = PagedKV(**PAGED)
    with pytest.raises(ShapeError, match="kv= stands for key and value"):
        attention(query, key, kv=kv)
    with pytest.raises(ShapeError, match="give key and value, or kv="):
        attention(query)
    with pytest.raises(ShapeError, match="kv is a tuple"):
        attention(query, kv=(key, key))
    with pytest.raises(ShapeError, match="kv has lengths of its own"):
        attention(
            query, kv=PagedKV(**PAGED, lengths=torch.tensor([3])), kv_lengths=torch.tensor([3])
        )
    with pytest.raises(ShapeError, match="give latent and key_rope, or kv="):
        latent_attention(query, query)
    with pytest.raises(ShapeError, match="kv holds 2 heads, expected 1"):
        latent_attention(query, ones(1, 4, 1, 4), kv=kv, w_uk=ones(4, 16, 8), w_uv=ones(4, 8, 8))
    assert repr(kv) == "PagedKV(B=1, K=2, L=9, D=16, V=4)"
    assert headwise.PagedKV is PagedKV
