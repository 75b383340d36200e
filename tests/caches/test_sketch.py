"""A sketch after any changes of its cache, beside one that is made anew."""

import copy
import random
from unittest import mock

import pytest
import torch

from headwise.caches import CacheChoice, Sketch, SketchedCache, sketch
from headwise.ops import dequantize, means_of, quantize

KINDS = ("contiguous", "paged:8", "int8", "int4", "int8:16", "int4:16")


def rows(cache):
    """Keys and values of a cache, as floats."""
    view = getattr(cache, "view", None)
    return (cache.first, cache.second) if view is None else view.dense(torch.float32)


def check(cache, made, queries):
    """What a sketch gives is what the rows that the cache holds give."""
    key, value = rows(cache)
    given = made.view(cache).dense(torch.float32)[0]
    if "int4" in cache.name:
        torch.testing.assert_close(given, key)
    else:
        torch.testing.assert_close(given, dequantize(*quantize(key, 4), 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        made.means(cache, queries), means_of(value, queries), rtol=1e-4, atol=1e-5
    )
    sums, count = made.sums(cache)
    assert 0 <= cache.length - count < 8
    torch.testing.assert_close(sums, value[:, :, :count].sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_the_cache_holds_after_any_changes(kind, seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    cache, made, batch = CacheChoice.parse(kind).make(), Sketch(), 2
    with mock.patch.object(sketch, "_BLOCK", 8):
        for _ in range(40):
            what = draw.randrange(6)
            if what == 0 and cache.length > 3:
                length = draw.randrange(1, cache.length)
                cache.crop(length)
                made.crop(length)
            elif what == 1 and cache.length:
                index = torch.tensor([draw.randrange(batch) for _ in range(draw.randint(1, 3))])
                cache.select(index)
                made.select(index)
                batch = len(index)
            elif what == 2 and cache.length:
                other = copy.copy(cache), copy.copy(made)
                other[0].append(*torch.randn(2, batch, 2, 3, 16))
                check(*other, 2)
            elif what == 3 and cache.length > 20 and draw.random() < 0.2:
                cache.reset()
                made.reset()
                batch = 2
            else:
                fresh = torch.randn(2, batch, 2, draw.choice([1, 1, 2, 5, 20]), 16)
                cache.append(*fresh)
                if draw.random() < 0.5:
                    made.view(cache, fresh[0])
            if cache.length > 2 and draw.random() < 0.7:
                check(cache, made, draw.choice([1, 2, 3]))


def test_it_is_made_when_it_is_asked_for():
    cache, made = CacheChoice.parse("contiguous").make(), Sketch()
    cache.append(*torch.randn(2, 1, 2, 600, 64))
    assert made.nbytes == 0
    view = made.view(cache)
    assert view.shape == (1, 2, 600, 64, 64) and made.nbytes == 2 * 600 * (32 + 8)
    assert made.room(cache, 1, 2, 3) is not None
    cache.append(*torch.randn(2, 1, 2, 1, 64))
    assert made.room(cache, 1, 2, 3) is None  # it has to catch up
    four = CacheChoice.parse("int4").make()
    four.append(*torch.randn(2, 1, 2, 9, 64))
    own = Sketch()
    assert own.view(four).key.data_ptr() == four.view.key.data_ptr()
    assert own.nbytes == 0


def test_a_cache_with_its_own_follows_by_itself():
    cache = SketchedCache()
    cache.append(*torch.randn(2, 2, 2, 40, 16))
    cache.sketch, cache.means(1)
    cache.crop(20)
    cache.append(*torch.randn(2, 2, 2, 9, 16))
    cache.select(torch.tensor([1, 1, 0]))
    twin = copy.copy(cache)
    twin.append(*torch.randn(2, 3, 2, 2, 16))
    for each in (cache, twin):
        torch.testing.assert_close(each.means(2), means_of(each.second, 2))
        integers, _ = quantize(each.first, 4)
        assert torch.equal(each.sketch.key, integers)
    cache.reset()
    cache.append(*torch.randn(2, 1, 1, 3, 16))
    assert cache.sketch.shape == (1, 1, 3, 16, 16)
