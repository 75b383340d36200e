"""The window cache: what it shows, what it keeps, and that its memory is bounded."""

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise import AttentionSpec, ShapeError, UnsupportedError, attention
from headwise.caches import WindowCache

B, K, D, V = 2, 3, 5, 7


def tokens(count, batch=B):
    return torch.randn(batch, K, count, D), torch.randn(batch, K, count, V)


class AgainstPlainTensors(RuleBasedStateMachine):
    """Any sequence of calls shows the ends of what concatenating plain tensors leaves."""

    @initialize(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), window=st.integers(1, 9))
    def start(self, seed, batch, window):
        torch.manual_seed(seed)
        self.cache, self.batch = WindowCache(window), batch
        self.all, self.kept_from = tokens(0, batch), 0

    @property
    def passed(self):
        return max(0, self.all[0].shape[2] - (self.cache.window - 1))

    @rule(count=st.sampled_from([0, 1, 1, 1, 2, 5, 40]), inference=st.booleans())
    def append(self, count, inference):
        passed = self.passed
        with torch.inference_mode(inference):
            new = tokens(count, self.batch)
            views = self.cache.append(*new)
        self.all = tuple(torch.cat(pair, dim=2) for pair in zip(self.all, new))
        for view, side in zip(views, self.all):
            assert torch.equal(view, side[:, :, passed:])
        if not self.cache.recording:
            self.kept_from = self.passed

    @rule()
    def record(self):
        if not self.cache.recording:
            self.kept_from = self.passed
        self.cache.recording = True

    @precondition(lambda self: self.cache.length > 0)
    @rule(data=st.data())
    def crop(self, data):
        length = data.draw(st.integers(0, self.cache.length))
        first = max(0, length - (self.cache.window - 1))
        outgrown = self.cache.length >= self.cache.window and not self.cache.recording
        if length < self.cache.length and (outgrown or first < self.kept_from):
            with pytest.raises(UnsupportedError, match="set recording=True"):
                self.cache.crop(length)
            return
        self.cache.crop(length)
        self.all = tuple(side[:, :, :length] for side in self.all)
        self.kept_from = self.passed

    @precondition(lambda self: self.cache.first is not None)
    @rule(data=st.data())
    def select(self, data):
        rows = st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4)
        index = torch.tensor(data.draw(rows))
        self.cache.select(index)
        self.all, self.batch = tuple(side[index] for side in self.all), len(index)

    @rule()
    def reset(self):
        self.cache.reset()
        self.all, self.kept_from = tokens(0, self.batch), 0
        assert self.cache.reserved_bytes == 0

    @invariant()
    def shows_what_the_window_reaches(self):
        length = self.all[0].shape[2]
        assert self.cache.length == length
        assert self.cache.held == min(length, self.cache.window - 1)
        if self.cache.first is not None:
            start = self.kept_from if self.cache.recording else self.passed
            for given, side in zip((self.cache.first, self.cache.second), self.all):
                assert torch.equal(given, side[:, :, start:])
            kept = length - start
            assert self.cache.nbytes == kept * self.batch * K * (D + V) * 4


AgainstPlainTensors.TestCase.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None
)
TestAgainstPlainTensors = AgainstPlainTensors.TestCase


@pytest.mark.parametrize("chunks", [[1] * 3000, [500, *[1] * 500], [100] * 40], ids=len)
def test_memory_is_bounded_whatever_the_length(chunks):
    cache, token = WindowCache(64), B * K * (D + V) * 4
    for chunk in chunks:
        cache.append(*tokens(chunk))
        # 63 held, as many again for room, and what one call brings
        assert cache.reserved_bytes <= 2 * (63 + chunk) * token
    assert cache.nbytes == 63 * token


def test_an_append_moves_the_window_now_and_then_only():
    cache, moves, last = WindowCache(500), 0, None
    for _ in range(10_000):
        cache.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        moves += cache.first.untyped_storage().data_ptr() != last
        last = cache.first.untyped_storage().data_ptr()
    assert moves <= 10_000 / 499 + 10


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("chunks", [[40], [7] * 6, [30, *[1] * 12]], ids=str)
def test_attention_over_it_is_that_of_the_whole_context(chunks, backend):
    total, cache = sum(chunks), WindowCache(9)
    query, (key, value) = torch.randn(B, 6, total, D), tokens(total)
    expected = attention(query, key, value, causal=True, window=9, backend="reference")
    outs, begin = [], 0
    for chunk in chunks:
        here = slice(begin, begin + chunk)
        seen = cache.append(key[:, :, here], value[:, :, here])
        outs.append(attention(query[:, :, here], *seen, causal=True, window=9, backend=backend))
        begin += chunk
    torch.testing.assert_close(torch.cat(outs, 2), expected, atol=1e-5, rtol=1e-5)


def test_it_costs_what_the_spec_says():
    spec = AttentionSpec(heads=6, kv_heads=K, head_dim=D, value_dim=V, window=20)
    cache = WindowCache(20)
    for count in (5, 10, 30, 1):
        cache.append(*tokens(count))
        assert cache.nbytes == spec.cache_bytes(cache.length, B, "float32")


def test_a_copy_goes_on_alone():
    cache = WindowCache(4)
    cache.append(*tokens(10))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin.append(*tokens(3))
        assert (twin.length, cache.length) == (13, 10)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="window is 0, expected at least 1"):
        WindowCache(0)
    cache = WindowCache(4)
    with pytest.raises(ShapeError, match="first is a NoneType"):
        cache.append(None, None)
    cache.append(*tokens(3))
    with pytest.raises(ShapeError, match="tokens have batch"):
        cache.append(*tokens(1, batch=5))
    with pytest.raises(ShapeError, match="crop to 9 tokens, expected 0 to 3"):
        cache.crop(9)
    assert cache.length == 3


def sunk(window, sinks, *counts):
    """A cache with sinks after appends of `counts` tokens, and everything that went in."""
    cache, held = WindowCache(window, sinks), tokens(sum(counts))
    for part in zip(*(side.split(counts, dim=2) for side in held)):
        cache.append(*part)
    return cache, held


def test_the_first_tokens_stay_where_sinks_are_asked_for():
    cache, held = sunk(4, 2, *[1] * 30)
    kept = [0, 1, 27, 28, 29]
    assert cache.held == 5
    for given, side in zip((cache.first, cache.second), held):
        assert torch.equal(given, side[:, :, kept])
    assert cache.nbytes == 5 * B * K * (D + V) * 4


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("chunks", [[40], [7] * 6, [30, *[1] * 12], [2, 1, 1, 17, 3]], ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(9, 4), (1, 3), (5, 40)])
def test_attention_with_sinks_is_that_of_the_whole_context_with_the_mask(
    window, sinks, chunks, backend
):
    total, cache = sum(chunks), WindowCache(window, sinks)
    query, (key, value) = torch.randn(B, 6, total, D), tokens(total)
    at = torch.arange(total)
    visible = (at <= at[:, None]) & ((at > at[:, None] - window) | (at < sinks))
    expected = attention(query, key, value, mask=visible[None, None], backend="reference")
    outs, begin = [], 0
    for chunk in chunks:
        here = slice(begin, begin + chunk)
        seen = cache.append(key[:, :, here], value[:, :, here])
        mask = cache.mask(chunk)
        assert (mask is None) == (chunk == 1)
        outs.append(attention(query[:, :, here], *seen, mask=mask, backend=backend))
        begin += chunk
    torch.testing.assert_close(torch.cat(outs, 2), expected, atol=1e-5, rtol=1e-5)


def test_columns_are_the_positions_of_the_keys_that_an_append_returned():
    cache, held = sunk(4, 2, 10)
    more = tokens(3)
    key, _ = cache.append(*more)
    columns = cache.columns(3)
    assert columns.tolist() == [0, 1, 7, 8, 9, 10, 11, 12]
    assert torch.equal(key, torch.cat([held[0], more[0]], dim=2)[:, :, columns])
    assert cache.mask(3).shape == (1, 1, 3, 8)
    # the first of the new tokens sees the sinks, three before it and itself
    assert cache.mask(3)[0, 0, 0].tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize("chunks", [[1] * 3000, [500, *[1] * 500], [100] * 40], ids=len)
def test_memory_with_sinks_is_bounded_whatever_the_length(chunks):
    cache, token = WindowCache(64, sinks=4), B * K * (D + V) * 4
    for chunk in chunks:
        cache.append(*tokens(chunk))
        # 67 held, as many again for room, and what one call brings
        assert cache.reserved_bytes <= 2 * (67 + chunk) * token
    assert cache.nbytes == 67 * token


def test_sinks_follow_a_reorder():
    cache, held = sunk(4, 2, 20, 1)
    cache.reorder(torch.tensor([1, 0]))
    more = tokens(1)
    key, _ = cache.append(*more)
    expected = torch.cat([held[0][[1, 0]], more[0]], dim=2)
    assert torch.equal(key, expected[:, :, [0, 1, 18, 19, 20, 21]])


def test_recorded_tokens_behind_sinks_can_be_taken_back():
    cache, held = sunk(4, 2, 20)
    cache.recording = True
    cache.append(*tokens(6))
    cache.crop(21 - 1)
    assert torch.equal(cache.first, held[0][:, :, [0, 1, 17, 18, 19]])
    with pytest.raises(UnsupportedError, match="set recording=True"):
        cache.crop(18)


def test_a_copy_with_sinks_goes_on_alone():
    cache, held = sunk(4, 2, 20)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin.append(*tokens(30))
        twin.first.zero_()
        assert torch.equal(cache.first, held[0][:, :, [0, 1, 17, 18, 19]])


def test_with_sinks_filled_under_inference_mode_it_works_on_outside():
    with torch.inference_mode():
        cache, held = sunk(4, 2, 20)
        cache.select(torch.tensor([1, 0]))
    more = tokens(30)
    for part in zip(*(side.split(1, dim=2) for side in more)):
        key, _ = cache.append(*part)
    expected = torch.cat([held[0][[1, 0]], more[0]], dim=2)
    assert torch.equal(key, expected[:, :, [0, 1, 46, 47, 48, 49]])


def test_a_negative_number_of_sinks_is_refused():
    with pytest.raises(ShapeError, match=r"^sinks is -1, expected 0 or more$"):
        WindowCache(4, -1)
