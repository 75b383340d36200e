"""The paged cache: what sequences share, what a page costs, what is copied, and what it refuses."""

import copy
import pickle
import re

import pytest
import torch

from headwise import CapacityError, ShapeError, UnsupportedError, attention, latent_attention
from headwise.caches import PagedCache
from headwise.caches import pools as module

B, H, K, D, V = 2, 6, 3, 5, 7
TOKEN = K * (D + V) * 4  # bytes


def tokens(count, batch=B):
    return torch.randn(batch, K, count, D), torch.randn(batch, K, count, V)


def filled(count, page_size=4, batch=B, **options):
    """A cache of `count` tokens a sequence, and what went in."""
    cache, held = PagedCache(page_size, **options), tokens(count, batch)
    cache.append(*held)
    return cache, held


def rows(cache, sequence):
    """What one sequence holds, [K, L, D] and [K, L, V], read through the page table."""
    view, length = cache.view, cache.lengths[sequence]
    pages = view.page_table[sequence].tolist()
    at = [(pages[i // cache.page_size], i % cache.page_size) for i in range(length)]
    return tuple(
        torch.stack([pool[page, :, row] for page, row in at], dim=1)
        for pool in (view.key, view.value)
    )


def assert_holds(cache, sequence, *expected):
    for given, side in zip(rows(cache, sequence), expected, strict=True):
        assert torch.equal(given, side)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_prompt_that_16_sequences_share_costs_its_bytes_once(page_size):
    cache, _ = filled(4096, page_size, batch=1)
    assert cache.nbytes == 4096 * TOKEN
    reserved = cache.reserved_bytes
    cache.select(torch.zeros(16, dtype=torch.int64))
    assert cache.nbytes == 4096 * TOKEN
    for steps in range(1, 21):
        cache.append(*tokens(1, 16))
        assert cache.nbytes == (4096 + 16 * steps) * TOKEN
    # 20 more tokens of 16 sequences take at most two pages each
    assert cache.reserved_bytes <= max(reserved, 2 * (4096 + 16 * 2 * page_size) * TOKEN)


def test_what_is_not_a_whole_page_is_copied_for_those_who_write_on():
    cache, _ = filled(10, page_size=4, batch=1)
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.nbytes == 10 * TOKEN
    cache.append(*tokens(1, 3))
    # the third page held 2 tokens: two copies of it, and each sequence its own new token
    assert cache.nbytes == (8 + 3 * 3) * TOKEN


def test_appending_to_a_copy_leaves_the_other_sequence_as_it_was():
    cache, (first, second) = filled(6, page_size=4)
    cache.select(torch.tensor([1, 1]))
    new = tokens(3)
    cache.append(*new, counts=[3, 0])
    assert cache.lengths == (9, 6)
    assert_holds(cache, 1, first[1], second[1])
    both = (torch.cat(pair, dim=1) for pair in ((first[1], new[0][0]), (second[1], new[1][0])))
    assert_holds(cache, 0, *both)


def test_a_page_whose_other_user_has_left_is_written_in_place():
    cache, _ = filled(6, page_size=4)
    cache.share(0, 6, [1])
    cache.select(torch.tensor([1]))
    last = cache.view.page_table[0, 1].item()
    cache.append(*tokens(2, 1))
    assert cache.view.page_table[0, 1].item() == last


def test_sharing_a_part_of_a_page_hides_the_rest_of_it():
    cache, (first, second) = filled(10, page_size=4)
    cache.share(0, 6, [1])
    assert cache.lengths == (10, 6)
    assert cache.nbytes == 10 * TOKEN
    new = tokens(1)
    cache.append(*new)
    assert_holds(
        cache, 0, torch.cat([first[0], new[0][0]], 1), torch.cat([second[0], new[1][0]], 1)
    )
    assert_holds(
        cache,
        1,
        torch.cat([first[0, :, :6], new[0][1]], 1),
        torch.cat([second[0, :, :6], new[1][1]], 1),
    )


def test_sharing_with_itself_and_with_nobody_changes_nothing():
    cache, (first, second) = filled(5)
    cache.share(0, 2, [0])
    cache.share(1, 2, [])
    assert cache.lengths == (5, 5)
    for sequence in range(B):
        assert_holds(cache, sequence, first[sequence], second[sequence])


def test_cropping_a_shared_page_and_writing_on_leaves_each_its_own_tokens():
    cache, (first, second) = filled(7, page_size=4, batch=1)
    cache.select(torch.tensor([0, 0]))
    cache.crop(5)
    new = tokens(2)
    cache.append(*new)
    for sequence in range(B):
        expected = (
            torch.cat([side[0, :, :5], added[sequence]], dim=1)
            for side, added in zip((first, second), new)
        )
        assert_holds(cache, sequence, *expected)
    assert cache.nbytes == (4 + 3 + 3) * TOKEN


def test_pages_are_used_again_so_that_a_thousand_rounds_take_no_more_memory():
    cache, _ = filled(30, page_size=4, batch=4)
    cache.select(torch.tensor([0, 1, 2, 3]))
    most = 0
    for step in range(1000):
        cache.append(*tokens(1, 4))
        cache.reorder(torch.randint(4, (4,)))
        if cache.length > 60:
            cache.crop(30)
        if step == 99:
            most = cache.reserved_bytes
    assert cache.reserved_bytes == most
    assert most <= 2 * 2 * 4 * 61 * TOKEN


def test_selecting_fewer_sequences_gives_their_pages_back():
    cache, _ = filled(64, page_size=4, batch=4)
    reserved = cache.reserved_bytes
    cache.select(torch.tensor([2]))
    assert cache.nbytes == 64 * TOKEN
    cache.append(*tokens(3 * 64, 1))
    assert cache.reserved_bytes == reserved


def test_counts_give_each_sequence_the_last_of_its_tokens():
    cache, new = PagedCache(4), tokens(6)
    cache.append(*new, counts=[6, 2])
    assert cache.lengths == (6, 2)
    assert_holds(cache, 0, new[0][0], new[1][0])
    assert_holds(cache, 1, new[0][1, :, 4:], new[1][1, :, 4:])


def test_counts_of_nothing_hold_nothing():
    cache = PagedCache(4)
    cache.append(*tokens(3), counts=[0, 0])
    assert cache.lengths == (0, 0)
    cache.append(*tokens(3), counts=[0, 3])
    assert cache.lengths == (0, 3)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_attention_over_ragged_sequences_is_that_over_each_alone(backend):
    cache, new = PagedCache(4), tokens(9)
    view = cache.append(*new, counts=[9, 5])
    query = torch.randn(B, H, 2, D)
    given = attention(query, kv=view, causal=True, backend=backend)
    for sequence, count in ((0, 9), (1, 5)):
        key, value = (side[sequence, None, :, 9 - count :] for side in new)
        one = query[sequence, None]
        expected = attention(one, key, value, causal=True, backend="reference")
        torch.testing.assert_close(given[sequence, None], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("paradigm", ["absorbed", "expanded"])
def test_latents_and_rope_keys_lie_in_pages_too(paradigm):
    rank, rope, nope = 11, 4, 6
    latent, key_rope = torch.randn(B, 1, 21, rank), torch.randn(B, 1, 21, rope)
    view = PagedCache(4).append(latent, key_rope)
    query = torch.randn(B, H, 2, nope), torch.randn(B, H, 2, rope)
    weights = torch.randn(H, nope, rank), torch.randn(H, V, rank)
    options = {"causal": True, "paradigm": paradigm}
    given = latent_attention(*query, w_uk=weights[0], w_uv=weights[1], kv=view, **options)
    options["backend"] = "reference"
    expected = latent_attention(*query, latent[:, 0], key_rope[:, 0], *weights, **options)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_a_pool_that_is_full_says_so_before_anything_changes():
    cache, (first, second) = filled(10, page_size=4, capacity=30)
    page = 4 * TOKEN
    # 30 tokens are 8 pages, of which 2 x 3 are in use
    assert cache.reserved_bytes == 8 * page
    message = (
        f"the pool of 8 pages ({8 * page:,} bytes) has 2 free, and 4 are needed "
        f"({4 * page:,} bytes)"
    )
    with pytest.raises(CapacityError, match=f"^{re.escape(message)}$"):
        cache.append(*tokens(10))
    assert (cache.lengths, cache.nbytes) == ((10, 10), 20 * TOKEN)
    for sequence in range(B):
        assert_holds(cache, sequence, first[sequence], second[sequence])
    new = tokens(6)
    cache.append(*new)
    assert_holds(
        cache, 1, torch.cat([first[1], new[0][1]], 1), torch.cat([second[1], new[1][1]], 1)
    )
    assert cache.reserved_bytes == 8 * page


def test_copies_of_shared_pages_count_against_the_capacity():
    cache, (first, _) = filled(7, page_size=4, batch=1, capacity=12)
    cache.select(torch.tensor([0, 0, 0]))
    # a token each needs two copies of the last page, and one page is free
    with pytest.raises(CapacityError, match="has 1 free, and 2 are needed"):
        cache.append(*tokens(1, 3))
    assert cache.lengths == (7, 7, 7)
    cache.select(torch.tensor([0, 0]))
    new = tokens(1)
    cache.append(*new)
    assert torch.equal(rows(cache, 1)[0], torch.cat([first[0], new[0][1]], 1))


def test_a_pool_that_does_not_fit_the_machine_says_what_it_needs():
    # a stride of 0 stands in for 2^50 bytes of tokens
    huge = torch.zeros(1, 1, 1, 1).expand(1, 2**10, 2**38, 1)
    cache = PagedCache()
    with pytest.raises(CapacityError, match=r"^the pool needs [\d,]+ bytes for [\d,]+ pages"):
        cache.append(huge, huge)
    assert (cache.length, cache.reserved_bytes, cache.view) == (0, 0, None)
    cache.append(*tokens(3))
    assert cache.lengths == (3, 3)


@pytest.mark.parametrize("change", ["append", "select", "share", "crop"])
def test_filled_under_inference_mode_it_works_on_outside(change):
    with torch.inference_mode():
        cache, held = filled(6, page_size=4)
        if change == "select":
            cache.select(torch.tensor([0, 1]))
        elif change == "share":
            cache.share(0, 6, [])
        elif change == "crop":
            cache.crop(6)
    new = tokens(5)
    cache.append(*new)
    for sequence in range(B):
        expected = (torch.cat([side[sequence], add[sequence]], 1) for side, add in zip(held, new))
        assert_holds(cache, sequence, *expected)
    query = torch.randn(B, H, 1, D, requires_grad=True)
    # what it holds can stand in a graph, as a constant
    attention(query, kv=cache.view).sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_lives_on_its_own(duplicate):
    cache, (first, second) = filled(6)
    twin = duplicate(cache)
    twin.append(*tokens(9))
    twin.view.key.zero_()
    assert (cache.length, twin.length) == (6, 15)
    for sequence in range(B):
        assert_holds(cache, sequence, first[sequence], second[sequence])


def test_every_pool_asks_for_large_pages_the_first_too(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "advise_large_pages", lambda pool: asked.append(pool.shape[1]))
    cache, _ = filled(4096, page_size=16, batch=1)
    assert asked == [cache.view.key.shape[0]] * 2
    cache.append(*tokens(8192, 1))
    assert asked[2:] == [cache.view.key.shape[0]] * 2


def test_an_empty_cache():
    cache = PagedCache()
    assert cache.view is None
    assert cache.length == cache.held == cache.nbytes == cache.reserved_bytes == 0
    cache.crop(0)
    cache.reset()
    cache.to("cpu")
    # a batch is not known yet, so there is nothing to select from
    cache.select(torch.tensor([3]))
    cache.reorder(torch.tensor([1, 0]))
    assert cache.lengths == ()


def test_after_a_reset_anything_fits():
    cache, _ = filled(5)
    cache.reset()
    assert cache.reserved_bytes == 0
    cache.append(torch.ones(5, 2, 1, 4, dtype=torch.float64), torch.ones(5, 2, 1, 4).double())
    assert cache.view.shape == (5, 2, 1, 4, 4)


@pytest.mark.parametrize("page_size", [0, -4, 3, 12, 2.0, "16"])
def test_a_page_size_that_is_no_power_of_two_is_refused(page_size):
    message = f"^page_size is {page_size!r}, expected a power of two$"
    with pytest.raises(ShapeError, match=message):
        PagedCache(page_size)


def test_a_capacity_of_nothing_is_refused():
    message = "^capacity is 0, expected at least 1 token, or None$"
    with pytest.raises(ShapeError, match=message):
        PagedCache(capacity=0)


BAD_CALLS = {
    "no tensors": (
        lambda cache: cache.append(None, None),
        "first is a NoneType, expected a tensor",
    ),
    "another batch": (
        lambda cache: cache.append(*tokens(1, 3)),
        "tokens have batch, heads, dim [3, 3, 5], torch.float32 on cpu; the cache holds [2, 3, 5]",
    ),
    "another dtype": (
        lambda cache: cache.append(*(side.half() for side in tokens(1))),
        "[2, 3, 5], torch.float16 on cpu; the cache holds [2, 3, 5], torch.float32 on cpu",
    ),
    "counts of another batch": (
        lambda cache: cache.append(*tokens(2), counts=[1]),
        "counts are [1], expected 2 of 0 to 2",
    ),
    "counts above the tokens": (
        lambda cache: cache.append(*tokens(2), counts=[1, 3]),
        "counts are [1, 3], expected 2 of 0 to 2",
    ),
    "crop of more": (
        lambda cache: cache.crop(6),
        "crop to 6 tokens, expected 0 to 5, those held",
    ),
    "crop below nothing": (lambda cache: cache.crop(-1), "crop to -1 tokens, expected 0 to 5"),
    "select of what is not there": (
        lambda cache: cache.select(torch.tensor([0, 2])),
        "index runs from 0 to 2, expected 0 to 1, those held",
    ),
    "select below": (
        lambda cache: cache.select(torch.tensor([-1])),
        "index runs from -1 to -1, expected 0 to 1",
    ),
    "a list as index": (lambda cache: cache.select([0]), "index is a list, expected a tensor"),
    "reorder to another batch": (
        lambda cache: cache.reorder(torch.tensor([0])),
        "index has shape [1], expected [2], one per sequence held",
    ),
    "share from nobody": (
        lambda cache: cache.share(2, 1, [0]),
        "share from 2 to [0]: sequences are 0 to 1",
    ),
    "share to nobody": (
        lambda cache: cache.share(0, 1, [1, 5]),
        "share from 0 to [1, 5]: sequences are 0 to 1",
    ),
    "share of more": (
        lambda cache: cache.share(1, 6, [0]),
        "share 6 tokens of sequence 1, which has 5",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(name):
    call, message = BAD_CALLS[name]
    cache, (first, second) = filled(5)
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        call(cache)
    assert "\n" not in str(caught.value)
    assert cache.lengths == (5, 5)
    for sequence in range(B):
        assert_holds(cache, sequence, first[sequence], second[sequence])


def test_tokens_that_need_gradients_are_refused():
    cache, (first, second) = PagedCache(), tokens(1)
    with pytest.raises(UnsupportedError, match=r"^first needs gradients"):
        cache.append(first.requires_grad_(), second)
    assert cache.view is None
