"""Whether somebody else holds a buffer: by PyTorch's counts, and by copying where it has none."""

import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from headwise.caches import ContiguousCache, PagedCache, QuantizedCache, WindowCache, holders
from headwise.caches.holders import alias, others_hold

HOLDERS = {
    "a slice": lambda t: t[:1],
    "all of it": lambda t: t[:, :],
    "a slice of a slice": lambda t: t[:1][:, 1:],
    "a transpose": lambda t: t.T,
    "an alias": alias,
    "data": lambda t: t.data,
    "an array": lambda t: t.detach().numpy(),
    "a capsule": lambda t: torch.utils.dlpack.to_dlpack(t[:]),
    "the storage": lambda t: t.untyped_storage(),
    "a graph": lambda t: (torch.ones(3, requires_grad=True) @ t[:]).sum(),
}


def test_pytorch_still_has_the_private_names():
    # without them every write after a crop copies: right, but slow enough to want to know
    assert callable(torch._C._storage_Use_Count)
    assert isinstance(torch.empty(1).untyped_storage()._cdata, int)
    assert holders._storage_use_count is torch._C._storage_Use_Count


@pytest.mark.parametrize("name", HOLDERS)
def test_whoever_can_see_the_memory_holds_it_until_he_lets_go(name):
    buffer = torch.randn(3, 5)
    assert not others_hold(buffer)
    holder = HOLDERS[name](buffer)
    assert others_hold(buffer)
    del holder
    assert not others_hold(buffer)


def test_copies_and_a_second_name_hold_nothing():
    buffer = torch.randn(3, 5)
    same, others = buffer, [buffer.clone(), buffer + 0, buffer[:2].contiguous().clone()]
    assert len(others) == 3
    assert same is buffer
    assert not others_hold(buffer)


def test_inference_mode_counts_as_well():
    buffer = torch.randn(3, 5)
    with torch.inference_mode():
        assert not others_hold(buffer)
        row = buffer[0]
        assert others_hold(buffer)
    assert row.shape == (5,)


def test_another_thread_holds_too():
    buffer, release, holding = torch.randn(3, 5), threading.Event(), threading.Event()

    def hold(row):
        holding.set()
        release.wait()
        return row

    thread = threading.Thread(target=hold, args=(buffer[1],))
    thread.start()
    holding.wait()
    assert others_hold(buffer)
    release.set()
    thread.join()
    del thread  # which keeps its arguments' frame no longer
    assert not others_hold(buffer)


def test_where_there_is_no_memory_nobody_holds_any():
    buffer = torch.empty(3, 5, device="meta")
    row = buffer[0]
    assert not others_hold(buffer)
    assert row.shape == (5,)


def test_of_a_subclass_it_cannot_be_told():
    class Other(torch.Tensor):
        pass

    assert others_hold(torch.randn(3).as_subclass(Other))


def pair(count):
    return torch.randn(1, 2, count, 6), torch.randn(1, 2, count, 4)


@pytest.mark.parametrize(
    "make",
    [ContiguousCache, lambda: PagedCache(4), QuantizedCache, lambda: WindowCache(3, sinks=2)],
)
def test_without_the_count_a_write_after_a_crop_copies(make, monkeypatch):
    new = pair(9), pair(2), pair(3)

    def run():
        cache = make()
        cache.recording = True
        kept = cache.append(*new[0])
        cache.crop(8)
        cache.append(*new[1])
        cache.crop(8)
        return kept, cache.append(*new[2])

    expected = run()
    monkeypatch.setattr(holders, "_storage_use_count", None)
    assert others_hold(torch.empty(1))
    for given, same in zip(run(), expected):
        if isinstance(given, tuple):
            assert all(map(torch.equal, given, same))
        else:
            assert all(map(torch.equal, given.dense(torch.float32), same.dense(torch.float32)))


def test_fake_tensors_pass_through_every_cache_that_plans_fill():
    with FakeTensorMode():
        for cache in (ContiguousCache(), QuantizedCache(), WindowCache(3, sinks=2)):
            cache.append(*pair(3))
            cache.crop(2)
            cache.append(*pair(9))
            cache.append(*pair(1))
            assert cache.length == 12


@pytest.mark.parametrize("taken", [0, 3])
def test_a_compiled_step_writes_over_nothing_that_is_held(taken):
    cache, new, more = ContiguousCache(), pair(9), pair(2)
    kept, _ = cache.append(*new)
    cache.crop(9 - taken)

    @torch.compile(backend="eager")
    def step(key, value):
        return cache.append(key, value)

    with torch.no_grad():
        first, _ = step(*more)
    assert torch.equal(first, torch.cat([new[0][:, :, : 9 - taken], more[0]], dim=2))
    assert torch.equal(kept, new[0])
