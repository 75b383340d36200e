"""How far the kernels are from float64, and that the number of threads changes no bit."""

import functools

import pytest
import torch

from headwise import attention, latent_attention
from headwise.caches import PagedCache, QuantizedCache
from headwise.ops import quantize
from headwise.ops.backend import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bound(query, key, scale, exact):
    """The largest root mean square of the error, from dtype and scores alone.

    A score of size |q||k| scale is a float32 sum, off by some 2^-24 of that, and so, relatively, is
    its weight; the sums of weights and values round a few times more. In half precision weights and
    output are rounded to the dtype as well, by half an eps each.
    """
    sizes = [rows.double().norm(dim=-1).max() for rows in (query, key)]
    score = float(sizes[0] * sizes[1]) * scale
    half = 0.0 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps
    return ((10 + score) * 2**-24 + half) * rms(exact)


def rms(x):
    return x.double().square().mean().sqrt()


# (batch, heads, kv heads, queries, D, V, keys): few rows per kv head, then many
SHAPES = [
    (1, 32, 8, 1, 64, 64, 500),
    (4, 16, 16, 1, 128, 128, 300),
    (4, 36, 12, 1, 80, 80, 65),
    (1, 32, 1, 1, 128, 128, 500),
    (1, 16, 1, 1, 576, 512, 300),
    (1, 8, 4, 16, 64, 64, 200),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_the_error_is_what_dtype_and_scores_allow(dtype, shape, factor, level):
    # 30: scores of hundreds, so that a few keys take nearly all
    batch, heads, kv_heads, length, dim, value_dim, context = shape
    for _ in range(5):
        query = (factor * torch.randn(batch, heads, length, dim)).to(dtype)
        key = torch.randn(batch, kv_heads, context, dim).to(dtype)
        value = torch.randn(batch, kv_heads, context, value_dim).to(dtype)
        exact = attention(query.double(), key.double(), value.double(), backend="reference")
        out = attention(query, key, value, backend="cpu")
        assert rms(out.double() - exact) <= bound(query, key, dim**-0.5, exact)


@functools.cache
def _long_context(dtype, heads):
    """Queries, key and value of 128k tokens, and their exact result."""
    generator = torch.Generator().manual_seed(heads)

    def draw(count, length):
        return torch.randn(1, count, length, 64, generator=generator).to(dtype)

    query, key, value = draw(heads, 2), draw(1, 2**17), draw(1, 2**17)
    exact = attention(query.double(), key.double(), value.double(), backend="reference")
    return query, key, value, exact


@pytest.mark.parametrize("heads", [3, pytest.param(32, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_does_not_grow_with_128k_keys(heads, dtype, level):
    query, key, value, exact = _long_context(dtype, heads)
    out = attention(query, key, value, backend="cpu")
    assert rms(out.double() - exact) <= bound(query, key, 1 / 8, exact)


# (batch, heads, kv heads, queries, D, keys): one part, several, of one sequence and of many, tiles
CALLS = [
    (1, 8, 2, 1, 64, 5000),
    (1, 32, 1, 1, 128, 20000),
    (5, 6, 3, 2, 32, 3000),
    (1, 3, 1, 2, 64, 70000),
    (3, 4, 2, 300, 64, 1500),
]


def same_bits(threads, run):
    """Assert that `run` gives the same for any number of threads, and each time."""
    threads(1)
    expected = run()
    for count in (1, 2, 3, 4, 7):
        threads(count)
        for given, one in zip(run(), expected, strict=True):
            assert torch.equal(given, one), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(call, dtype, level, threads):
    batch, heads, kv_heads, length, dim, context = call
    query = torch.randn(batch, heads, length, dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, context, dim, dtype=dtype)
    lengths = torch.randint(context // 2, context + 1, (batch,))
    options = {"causal": True, "return_lse": True, "backend": "cpu"}
    same_bits(threads, lambda: attention(query, key, value, **options))
    same_bits(threads, lambda: attention(query, key, value, kv_lengths=lengths, **options))


@pytest.mark.parametrize("cache", [lambda: PagedCache(16), lambda: QuantizedCache(8)])
def test_any_number_of_threads_gives_the_same_bits_of_a_view(cache, level, threads):
    cache = cache()
    view = cache.append(*torch.randn(2, 2, 3, 4000, 64))
    query = torch.randn(2, 9, 2, 64)
    options = {"causal": True, "return_lse": True, "backend": "cpu"}
    same_bits(threads, lambda: attention(query, kv=view, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_threads_gives_the_same_bits_of_absorbed_mla(batch, dtype, level, threads):
    heads, length, nope, rope, rank, value_dim, context = 7, 5, 31, 17, 128, 33, 2500
    shapes = (
        *((batch, heads, length, nope), (batch, heads, length, rope)),
        *((batch, context, rank), (batch, context, rope)),
        *((heads, nope, rank), (heads, value_dim, rank)),
    )
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    options = {"causal": True, "return_lse": True, "paradigm": "absorbed", "backend": "cpu"}
    same_bits(threads, lambda: latent_attention(*tensors, **options))


def test_any_number_of_threads_gives_the_same_bits_of_products_and_integers(level, threads):
    x, weight = torch.randn(1, 7, 5, 96), torch.randn(7, 96, 200)
    same_bits(threads, lambda: (cpu.project(x, weight, up=True),))
    rows = torch.randn(2, 3, 700, 96)
    same_bits(threads, lambda: quantize(rows, 4))
