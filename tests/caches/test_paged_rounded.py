"""Pages of integers: what a quantised cache holds, in pages that sequences share."""

import re

import pytest
import torch

from headwise import CapacityError, QuantKV, ShapeError, attention
from headwise.caches import PagedCache, QuantizedCache

B, H, K = 2, 6, 3
# even ones for 4 bits, one of them a group of 32 and a part
D, V = 36, 10
TOKEN = {8: K * (D + V + 2 * 4), 4: K * (D // 2 + V // 2 + 3 * 4)}  # bytes

both_bits = pytest.mark.parametrize("bits", [8, 4])


def tokens(count, batch=B, dims=(D, V)):
    return tuple(torch.randn(batch, K, count, dim) for dim in dims)


def gathered(view):
    """Integers and scales of every sequence, [B, K, L, ...], read through the page table."""
    pools = view.key, view.key_scales, view.value, view.value_scales
    table = view.page_table.long()
    return [pool[table].transpose(1, 2).flatten(2, 3)[:, :, : view.context] for pool in pools]


@both_bits
@pytest.mark.parametrize("dims", [(D, V), (V, 0)])
def test_the_integers_are_those_of_a_quantised_cache_to_the_bit(dims, bits):
    paged, plain = PagedCache(4, bits=bits), QuantizedCache(bits)
    for count in (5, 1, 1, 2, 0, 11):
        new = tokens(count, dims=dims)
        found, expected = paged.append(*new), plain.append(*new)
        assert isinstance(found, QuantKV)
        assert found.shape == expected.shape
        whole = expected.key, expected.key_scales, expected.value, expected.value_scales
        for one, other in zip(gathered(found), whole, strict=True):
            assert torch.equal(one, other)
    assert paged.nbytes == plain.nbytes


@both_bits
def test_scales_count_and_what_sequences_share_counts_once(bits):
    cache = PagedCache(4, bits=bits)
    cache.append(*tokens(10, batch=1))
    assert cache.nbytes == 10 * TOKEN[bits]
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.nbytes == 10 * TOKEN[bits]
    assert cache.reserved_bytes % (4 * TOKEN[bits]) == 0
    cache.append(*tokens(1, batch=3))
    # the third page held 2 tokens: two copies of it, and each sequence its own new token
    assert cache.nbytes == (8 + 3 * 3) * TOKEN[bits] <= cache.reserved_bytes


@both_bits
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_attention_over_ragged_sequences_is_that_over_each_alone(backend, bits):
    cache, new = PagedCache(4, bits=bits), tokens(9)
    view = cache.append(*new, counts=[9, 5])
    query = torch.randn(B, H, 2, D)
    given = attention(query, kv=view, causal=True, backend=backend)
    # queries and weights are rounded to 16 bits where int8 is multiplied
    close = 2**-11 if (backend, bits) == ("cpu", 8) else 2e-5
    for sequence, count in ((0, 9), (1, 5)):
        alone = QuantizedCache(bits)
        rows = alone.append(*(side[sequence, None, :, 9 - count :] for side in new))
        one = query[sequence, None]
        expected = attention(one, kv=rows, causal=True, backend="reference")
        torch.testing.assert_close(given[sequence, None], expected, atol=close, rtol=close)


@both_bits
def test_a_pool_that_is_full_says_so_before_anything_changes(bits):
    cache = PagedCache(4, capacity=18, bits=bits)
    before = gathered(cache.append(*tokens(5)))
    page = 4 * TOKEN[bits]
    # 18 tokens are 5 pages, of which 2 x 2 are in use
    message = f"the pool of 5 pages ({5 * page:,} bytes) has 1 free, and 2 are needed"
    with pytest.raises(CapacityError, match=f"^{re.escape(message)}"):
        cache.append(*tokens(4))
    assert cache.lengths == (5, 5)
    assert all(map(torch.equal, gathered(cache.view), before))


def test_tokens_of_any_dtype_are_rounded_and_other_sizes_refused():
    cache = PagedCache(4, bits=4)
    cache.append(*tokens(3))
    cache.append(*(side.bfloat16() for side in tokens(2)))
    assert cache.lengths == (5, 5)
    with pytest.raises(ShapeError, match=re.escape("dim [2, 3, 10], torch.float32 on cpu; the")):
        cache.append(*tokens(1, dims=(V, D)))
    with pytest.raises(ShapeError, match=r"rows of 7 elements, expected an even number"):
        PagedCache(4, bits=4).append(*tokens(1, dims=(7, 7)))
    with pytest.raises(ShapeError, match=r"^bits is 5, expected 4 or 8$"):
        PagedCache(bits=5)
    assert cache.lengths == (5, 5)
