"""A paged cache over memory that exists: one region in which pages of all layers lie in turns."""

import copy
import pickle
import re

import pytest
import torch

from headwise import ShapeError, attention
from headwise.caches import PagedCache, QuantizedCache

B, H, K, D, V = 2, 6, 3, 32, 8
LAYERS, PAGES, SIZE = 3, 9, 4
# pages in use, in any order; entries behind a sequence's last page may be anything
TABLE = torch.tensor([[7, 2, 5], [0, 4, 99]], dtype=torch.int32)
LENGTHS = [10, 6]
KINDS = {None: "paged:4", 8: "int8:4", 4: "int4:4"}

every_kind = pytest.mark.parametrize("bits", KINDS)


def tokens(count, batch=B):
    return torch.randn(batch, K, count, D), torch.randn(batch, K, count, V)


def row_bytes(bits):
    """Bytes of a row in each pool; a row has one scale."""
    if bits is None:
        return [4 * D, 4 * V]
    return [D * bits // 8, 4, V * bits // 8, 4]


def region_of(bits):
    """Bytes [pages, layers, bytes of a page], and the pools of one layer in it."""
    sizes = row_bytes(bits)
    region = torch.randint(0, 256, (PAGES, LAYERS, K * SIZE * sum(sizes)), dtype=torch.uint8)
    rows = torch.int8 if bits == 8 else torch.uint8
    dtypes = [torch.float32] * 2 if bits is None else [rows, torch.float32] * 2
    pools, at = [], 0
    for size, dtype in zip(sizes, dtypes, strict=True):
        part = region[:, 1, at : at + K * SIZE * size].unflatten(1, (K, SIZE, size))
        pools.append(part.view(dtype).transpose(0, 1))
        at += K * SIZE * size
    return region, pools


def filled(bits):
    """A region that holds the tokens of TABLE and LENGTHS, its pools, and a cache of the same."""
    region, pools = region_of(bits)
    new = tokens(max(LENGTHS))
    plain = PagedCache(SIZE, bits=bits)
    view = plain.append(*new, counts=LENGTHS)
    held = [view.key, view.value]
    if bits is not None:
        held = [view.key, view.key_scales, view.value, view.value_scales]
    for sequence, length in enumerate(LENGTHS):
        for index in range(-(-length // SIZE)):
            for pool, own in zip(pools, held, strict=True):
                pool[:, TABLE[sequence, index]] = own[view.page_table[sequence, index]]
    return region, pools, plain


def agree(cache, plain):
    """Whether both hold the same, and attention sees the same in both, to the bit."""
    assert cache.lengths == plain.lengths
    assert cache.nbytes == plain.nbytes
    query = torch.randn(len(cache.lengths), H, 1, D)
    for backend in ("cpu", "reference"):
        found, expected = (
            attention(query, kv=one.view, causal=True, backend=backend) for one in (cache, plain)
        )
        assert torch.equal(found, expected)


@every_kind
def test_appends_go_on_in_the_region_and_touch_nothing_else(bits):
    region, pools, plain = filled(bits)
    before = region.clone()
    cache = PagedCache.over(pools, TABLE, LENGTHS, bits=bits)
    assert cache.name == KINDS[bits]
    agree(cache, plain)
    for counts in (None, [1, 0], [3, 5]):
        new = tokens(5 if counts == [3, 5] else 1)
        view = cache.append(*new, counts=counts)
        plain.append(*new, counts=counts)
        agree(cache, plain)
        assert view.key.untyped_storage().data_ptr() == region.untyped_storage().data_ptr()
    assert torch.equal(region[:, 0], before[:, 0])
    assert torch.equal(region[:, 2], before[:, 2])
    held = [page for row, length in zip(TABLE, LENGTHS) for page in row[: length // SIZE].tolist()]
    assert torch.equal(region[held], before[held])  # whole pages are not written again
    assert not torch.equal(region[:, 1], before[:, 1])
    assert TABLE.tolist() == [[7, 2, 5], [0, 4, 99]]


@every_kind
def test_one_token_of_one_sequence_is_written_where_it_belongs(bits):
    region, pools, _ = filled(bits)
    before = region.clone()
    cache = PagedCache.over(pools, TABLE[:1], LENGTHS[:1], bits=bits)
    new = tokens(1, batch=1)
    cache.append(*new)
    # the eleventh token is the third of page 5
    expected = new
    if bits is not None:
        kv = QuantizedCache(bits).append(*new)
        expected = kv.key, kv.key_scales, kv.value, kv.value_scales
    for pool, own in zip(pools, expected, strict=True):
        assert torch.equal(pool[:, 5, 2], own[0, :, 0])
    assert (region != before).any(-1).nonzero().tolist() == [[5, 1]]


@every_kind
def test_more_than_the_region_has_room_for_moves_to_pools_of_its_own(bits):
    region, pools, plain = filled(bits)
    cache = PagedCache.over(pools, TABLE, LENGTHS, bits=bits)
    new = tokens(20)
    cache.append(*new)
    plain.append(*new)
    agree(cache, plain)
    before = region.clone()
    new = tokens(3)
    cache.append(*new)
    plain.append(*new)
    agree(cache, plain)
    assert torch.equal(region, before)


@every_kind
def test_sequences_that_share_pages_there_part_when_they_write(bits):
    _, pools, plain = filled(bits)
    table = TABLE[[0, 0, 1]]
    plain.select(torch.tensor([0, 0, 1]))
    cache = PagedCache.over(pools, table, [10, 10, 6], bits=bits)
    agree(cache, plain)
    kept = cache.view, cache.view.dense(torch.float32)
    new = tokens(2, batch=3)
    cache.append(*new)
    plain.append(*new)
    agree(cache, plain)
    assert all(map(torch.equal, kept[0].dense(torch.float32), kept[1]))


@every_kind
def test_a_view_that_is_kept_stays_as_it_was_after_a_crop(bits):
    _, pools, plain = filled(bits)
    cache = PagedCache.over(pools, TABLE, LENGTHS, bits=bits)
    twin, kept = copy.copy(cache), cache.view.dense(torch.float32)
    for one in (cache, plain):
        one.crop(5)
    new = tokens(4)
    cache.append(*new)
    plain.append(*new)
    agree(cache, plain)
    assert all(map(torch.equal, twin.view.dense(torch.float32), kept))


def test_under_inference_mode_it_goes_on_outside():
    _, pools, plain = filled(None)
    with torch.inference_mode():
        cache = PagedCache.over(pools, TABLE, LENGTHS)
    new = tokens(9)
    cache.append(*new)
    plain.append(*new)
    agree(cache, plain)


def pools_of(*changes):
    return [torch.zeros(K, PAGES, SIZE, dim) for dim in changes or (D, V)]


REFUSED = {
    "one pool": ((pools_of(D), TABLE, LENGTHS), {}, "shapes [[3, 9, 4, 32]], expected 2 tensors"),
    "no scales": ((pools_of(), TABLE, LENGTHS), {"bits": 8}, "expected 4 tensors [K, pages, page"),
    "three dims": (
        ([pool[0] for pool in pools_of()], TABLE, LENGTHS),
        {},
        "expected 2 tensors [K, pages, page size, dim]",
    ),
    "rows apart": (
        ([pool[..., ::2] for pool in pools_of()], TABLE, LENGTHS),
        {},
        "whose last dim has a stride of 1",
    ),
    "another dtype": (
        ([pools_of(D)[0], pools_of(V)[0].half()], TABLE, LENGTHS),
        {},
        "kv.value has shape [9, 3, 4, 8] and dtype torch.float16",
    ),
    "not integers": (
        (pools_of(D, 1, V, 1), TABLE, LENGTHS),
        {"bits": 8},
        "expected 4 dims, torch.",
    ),
    "more pages": (
        ([pools_of(D)[0], pools_of(V)[0][:, 1:]], TABLE, LENGTHS),
        {},
        "kv.value has shape [8, 3, 4, 8], expected [pages, K, page size, V]",
    ),
    "pages of three": (
        ([pool[:, :, :3] for pool in pools_of()], TABLE, LENGTHS),
        {},
        "page_size is 3, expected a power of two",
    ),
    "a page that is not there": (
        (pools_of(), TABLE, [10, 9]),
        {},
        "names pages 0 to 99, expected 0 to 8, those of the pool",
    ),
    "a longer sequence": ((pools_of(), TABLE, [13, 6]), {}, "kv.context is 13, expected 0 to 12"),
    "a length below 0": (
        (pools_of(), TABLE, [10, -1]),
        {},
        "lengths are [10, -1], expected [B, n]",
    ),
    "another batch": ((pools_of(), TABLE, [10]), {}, "table has shape [2, 3] and lengths are [10]"),
    "a table of 64 bits": (
        (pools_of(), TABLE.long(), LENGTHS),
        {},
        "kv.page_table has shape [2, 3] and dtype torch.int64",
    ),
    "5 bits": ((pools_of(D, 1, V, 1), TABLE, LENGTHS), {"bits": 5}, "bits is 5, expected 4 or 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused_in_one_line(name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        PagedCache.over(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_neither_spare_pages_nor_its_neighbours(copied) -> None:
    """A region in which other layers lie too, and much room: a copy takes what is used."""
    region = torch.zeros(500, 2, 3, 16, 8)
    pools = [region[:, side].transpose(0, 1) for side in (0, 1)]
    cache = PagedCache.over(pools, torch.tensor([[4, 2]], dtype=torch.int32), [20])
    kv = cache.append(torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8))
    twin = copied(cache)
    assert twin.reserved_bytes <= 5 * 16 * 3 * 8 * 2 * 4
    for one, other in zip(twin.view.dense(torch.float32), kv.dense(torch.float32), strict=True):
        assert torch.equal(one, other)
    after = twin.append(torch.full((1, 3, 30, 8), 2.0), torch.full((1, 3, 30, 8), 2.0))
    assert after.dense(torch.float32)[0].sum() == 3 * 8 * (1 + 60)
    assert cache.length == 21
