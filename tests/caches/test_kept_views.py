"""What a cache handed out stays as it was; where nobody keeps any of it, nothing is copied.

Random sequences of calls are in test_fuzz.py; here are the cases that say why.
"""

import copy
import pickle
import tempfile
import threading

import pytest
import torch

from headwise import attention
from headwise.caches import ContiguousCache, DiskCache, PagedCache, QuantizedCache, WindowCache
from headwise.ops import dequantize, quantize

MAKE = {
    "contiguous": ContiguousCache,
    "window": lambda: WindowCache(37),
    "sinks": lambda: WindowCache(37, sinks=3),
    "paged": lambda: PagedCache(4),
    "int8": lambda: QuantizedCache(8),
    "int4": lambda: QuantizedCache(4),
    "disk": lambda: DiskCache(tempfile.gettempdir(), 4),
    "int8:4": lambda: PagedCache(4, bits=8),
    "int4:4": lambda: PagedCache(4, bits=4),
}
# heads and dims of key and value, of latent and rope key
PAIRS = {"key and value": (3, 10, 14), "latent and rope key": (1, 22, 6)}

every_cache = pytest.mark.parametrize("kind", MAKE)
every_pair = pytest.mark.parametrize("pair", PAIRS)


def tokens(count, pair="key and value", batch=2):
    heads, *dims = PAIRS[pair]
    return tuple(torch.randn(batch, heads, count, dim) for dim in dims)


def parts(view):
    """The tensors that a view consists of."""
    if isinstance(view, tuple):
        return view
    names = ("key", "value", "page_table", "key_scales", "value_scales")
    every = (getattr(view, name, None) for name in names)
    return tuple(part for part in every if part is not None)


def memory(view):
    """Where the rows lie; a page table may change without them."""
    return [at.untyped_storage().data_ptr() for at in parts(view) if at.dtype != torch.int32]


def rows(view):
    return view if isinstance(view, tuple) else view.dense(torch.float32)


def rounded(side, kind):
    bits = {"int8": 8, "int4": 4}.get(kind.partition(":")[0])
    return dequantize(*quantize(side, bits), bits) if bits else side


def assert_rows(view, expected, kind):
    for given, side in zip(rows(view), expected, strict=True):
        # rotating back sums in an order that depends on how many rows there are
        atol = 1e-6 if kind.startswith("int4") else 0
        torch.testing.assert_close(given, rounded(side, kind), atol=atol, rtol=0)


@every_cache
@every_pair
def test_rounds_of_crop_and_append_stay_where_they_are(kind, pair):
    cache = MAKE[kind]()
    held = tokens(9, pair)
    where = memory(cache.append(*held))
    for taken in (1, 3, 4, 2, 6, 5):
        cache.crop(cache.length - taken)
        new = tokens(taken + 1, pair)
        view = cache.append(*new)
        held = tuple(torch.cat([a[:, :, :-taken], b], dim=2) for a, b in zip(held, new))
        assert memory(view) == where
        assert_rows(view, held, kind)
        del view


@every_cache
@every_pair
def test_a_kept_view_makes_the_next_write_move_once(kind, pair):
    cache, first, new = MAKE[kind](), tokens(9, pair), (tokens(4, pair), tokens(2, pair))
    where = memory(cache.append(*first))
    kept = cache.append(*new[0])
    bits = [side.clone() for side in rows(kept)]
    assert memory(kept) == where
    cache.crop(9)
    view = cache.append(*new[1])
    assert not set(memory(view)) & set(where)
    moved = memory(view)
    del view
    for _ in range(3):
        cache.crop(9)
        view = cache.append(*new[1])
        assert memory(view) == moved
        assert_rows(view, [torch.cat(two, dim=2) for two in zip(first, new[1])], kind)
        del view
    assert all(map(torch.equal, rows(kept), bits))
    assert_rows(kept, [torch.cat(two, dim=2) for two in zip(first, new[0])], kind)


@every_cache
def test_appends_at_the_end_move_nothing_whoever_keeps_all_views(kind):
    cache = MAKE[kind]()
    kept, held = [cache.append(*tokens(9))], []
    while len(kept) < 7:
        kept.append(cache.append(*tokens(1)))
        held.append([side.clone() for side in rows(kept[-1])])
    assert all(memory(view) == memory(kept[0]) for view in kept)
    for view, bits in zip(kept[1:], held, strict=True):
        assert all(map(torch.equal, rows(view), bits))


def test_a_kept_slice_of_one_side_is_enough():
    cache = ContiguousCache()
    value = cache.append(*tokens(9))[1][0, 1:, 5:, ::3]
    before = value.clone()
    cache.crop(2)
    cache.append(*tokens(7))
    assert torch.equal(value, before)


def test_tokens_may_come_from_what_was_just_cropped():
    cache = ContiguousCache()
    first, second = cache.append(*tokens(9))
    expected = [torch.cat([side[:, :, :4], side[:, :, 2:7]], dim=2) for side in (first, second)]
    cache.crop(4)
    given = cache.append(first[:, :, 2:7], second[:, :, 2:7])
    assert all(map(torch.equal, given, expected))


def test_sinks_are_put_in_front_in_place_unless_a_view_is_kept():
    window, sinks = 8, 3
    cache, held = WindowCache(window, sinks), tokens(12)
    where = memory(cache.append(*held))
    kept = []
    for step in range(12):
        new = tokens(1)
        held = tuple(torch.cat(two, dim=2) for two in zip(held, new))
        view = cache.append(*new)
        seen = [*range(sinks), *range(held[0].shape[2] - window, held[0].shape[2])]
        expected = [side[:, :, seen] for side in held]
        assert all(map(torch.equal, view, expected))
        if step < 6:
            assert memory(view) == where
        else:
            kept.append((view, expected))
        del view
    for view, expected in kept:
        assert all(map(torch.equal, view, expected))


def test_a_page_whose_rows_another_sequence_leaves_behind_is_not_written_under_a_view():
    cache, held = PagedCache(4), tokens(7, batch=3)
    cache.append(*held)
    cache.share(0, 5, [1])
    cache.append(*tokens(1, batch=3), counts=[0, 0, 1])  # nothing was kept until here
    kept = cache.view
    bits = [side.clone() for side in kept.dense(torch.float32)], kept.page_table.clone()
    # sequence 0 takes its rows along, and sequence 1 goes on where they were
    cache.append(*tokens(2, batch=3), counts=[1, 2, 0])
    assert all(map(torch.equal, kept.dense(torch.float32), bits[0]))
    assert torch.equal(kept.page_table, bits[1])
    assert torch.equal(kept.dense(torch.float32)[0][0, :, :7], held[0][0])


def test_a_kept_page_table_does_not_change():
    cache = PagedCache(2)
    cache.append(*tokens(6), counts=[6, 1])
    table = cache.view.page_table
    before = table.clone()
    cache.append(*tokens(4), counts=[0, 4])  # pages in columns that the table shows
    cache.crop(2)
    cache.append(*tokens(3))
    assert torch.equal(table, before)


@every_cache
@pytest.mark.parametrize("taken", [0, 3])
def test_a_view_in_a_graph_is_a_constant_whatever_is_appended(kind, taken):
    def gradient(meanwhile):
        torch.manual_seed(1)
        cache = MAKE[kind]()
        view = cache.append(*tokens(9))
        query = torch.randn(2, 3, 5, 10, requires_grad=True)
        given = {"kv": view} if not isinstance(view, tuple) else dict(zip(("key", "value"), view))
        out = attention(query, **given)
        del view, given
        if meanwhile:
            cache.crop(9 - taken)
            cache.append(*tokens(2))
        out.square().sum().backward()
        return query.grad

    assert torch.equal(gradient(meanwhile=True), gradient(meanwhile=False))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@every_cache
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first_to_write", ["the original", "the copy"])
def test_a_copy_and_its_original_go_their_own_ways(kind, how, first_to_write):
    cache, held = MAKE[kind](), tokens(9)
    cache.append(*held)
    pair = [cache, COPIES[how](cache)]
    if first_to_write == "the copy":
        pair.reverse()
    news = tokens(3), tokens(2)
    views = [one.append(*new) for one, new in zip(pair, news)]
    for view, new in zip(views, news):
        assert_rows(view, [torch.cat(two, dim=2) for two in zip(held, new)], kind)
    for one, new in zip(pair, news):
        one.crop(4)
        view = one.append(*new)
        assert_rows(view, [torch.cat([a[:, :, :4], b], 2) for a, b in zip(held, new)], kind)


@every_cache
def test_a_shallow_copy_shares_memory_until_one_of_them_writes(kind):
    cache, held = MAKE[kind](), tokens(9)
    where = memory(cache.append(*held))
    twin = copy.copy(cache)
    assert type(twin) is type(cache)
    assert (twin.length, twin.nbytes) == (9, cache.nbytes)
    view = twin.append(*tokens(1))
    assert not set(memory(view)) & set(where)
    del view
    assert memory(cache.append(*tokens(1))) == where  # nobody else is left there
    assert cache.length == twin.length == 10


@every_cache
def test_a_shallow_copy_that_is_gone_costs_nothing(kind):
    cache = MAKE[kind]()
    where = memory(cache.append(*tokens(9)))
    for _ in range(3):
        copy.copy(cache)
        assert memory(cache.append(*tokens(1))) == where


@every_cache
@pytest.mark.parametrize("change", ["select", "reset", "crop"])
def test_changes_to_an_original_do_not_reach_its_copy(kind, change):
    cache, held = MAKE[kind](), tokens(9)
    cache.append(*held)
    twin = copy.copy(cache)
    if change == "select":
        cache.reorder(torch.tensor([1, 0]))
        cache.select(torch.tensor([1, 1, 0]))
    else:
        getattr(cache, change)(*[5] * (change == "crop"))
    new = tokens(2, batch=3 if change == "select" else 2)
    cache.append(*new)
    assert twin.length == 9
    more = tokens(1)
    view = twin.append(*more)
    assert_rows(view, [torch.cat(two, dim=2) for two in zip(held, more)], kind)


@every_cache
def test_an_empty_cache_can_be_copied(kind):
    cache = MAKE[kind]()
    twin, new = copy.copy(cache), tokens(3)
    twin.append(*new)
    assert (cache.length, twin.length) == (0, 3)
    assert_rows(twin.append(*(side[:, :, :0] for side in new)), new, kind)


@pytest.mark.parametrize("kind", ["contiguous", "sinks", "paged", "int8"])
def test_threads_with_a_copy_each_do_not_meet(kind):
    cache, held = MAKE[kind](), tokens(9)
    cache.append(*held)
    copies, found = [copy.copy(cache) for _ in range(4)], []

    def work(seed, one):
        generator = torch.Generator().manual_seed(seed)
        expected = held
        for _ in range(30):
            length = int(torch.randint(4, expected[0].shape[2] + 1, (1,), generator=generator))
            one.crop(length)
            new = [torch.randn(*side.shape[:2], 2, side.shape[3], generator=generator)
                   for side in held]  # fmt: skip
            expected = tuple(torch.cat([a[:, :, :length], b], 2) for a, b in zip(expected, new))
            view = one.append(*new)
        assert_rows(view, expected, kind)
        found.append(seed)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert_rows(cache.append(*(side[:, :, :0] for side in held)), held, kind)
