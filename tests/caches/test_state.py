"""The cache of a state: what it holds and counts, and what it cannot take back."""

import copy

import pytest
import torch

import headwise
from headwise.caches import StateCache


def filled(batch: int = 3, tokens: int = 5, lengths: list[int] | None = None) -> StateCache:
    cache = StateCache()
    generator = torch.Generator().manual_seed(0)
    cache.hold(
        torch.randn(batch, 6, 4, generator=generator, dtype=torch.float64).bfloat16(),
        torch.randn(batch, 2, 3, 5, generator=generator),
    )
    cache.count(tokens, None if lengths is None else torch.tensor(lengths))
    return cache


def test_bytes_are_those_held_whatever_the_tokens() -> None:
    cache = StateCache()
    assert (cache.nbytes, cache.reserved_bytes, cache.batch, cache.length) == (0, 0, None, 0)
    for tokens in (1, 1000):
        cache = filled(tokens=tokens)
        assert cache.nbytes == cache.reserved_bytes == 3 * (6 * 4 * 2 + 2 * 3 * 5 * 4)
        assert (cache.length, cache.batch, cache.starts) == (tokens, 3, None)


def test_without_a_convolution_the_state_is_all() -> None:
    cache = StateCache()
    cache.hold(None, torch.zeros(2, 1, 3, 5))
    assert (cache.nbytes, cache.batch) == (2 * 3 * 5 * 4, 2)
    assert copy.copy(cache).inputs is None


@pytest.mark.parametrize(
    ("index", "starts", "length"),
    [([2, 0, 0], [3, 1, 1], 3), ([0, 0, 0], None, 1), ([1, 1, 1], None, 5), ([2], None, 3)],
)
def test_sequences_are_selected_with_their_lengths(
    index: list[int], starts: list[int] | None, length: int
) -> None:
    cache = filled(lengths=[1, 5, 3])
    inputs, state = cache.inputs, cache.state
    assert inputs is not None and state is not None and cache.starts == [1, 5, 3]
    cache.select(torch.tensor(index))
    assert torch.equal(cache.inputs, inputs[index]) and torch.equal(cache.state, state[index])
    assert (cache.starts, cache.length, cache.batch) == (starts, length, len(index))


def test_reorder_keeps_the_batch_size() -> None:
    cache = filled()
    state = cache.state
    with pytest.raises(headwise.ShapeError, match="one per sequence held"):
        cache.reorder(torch.tensor([0, 1]))
    with pytest.raises(headwise.ShapeError, match="index runs from 0 to 3"):
        cache.reorder(torch.tensor([0, 1, 3]))
    cache.reorder(torch.tensor([2, 2, 1], dtype=torch.int32))
    assert state is not None and torch.equal(cache.state, state[[2, 2, 1]])


def test_tokens_are_counted_in_each_sequence() -> None:
    cache = filled(lengths=[1, 5, 3])
    cache.count(2)
    assert (cache.starts, cache.length) == ([3, 7, 5], 7)
    cache.count(4, torch.tensor([4, 0, 2]))
    assert (cache.starts, cache.length) == (None, 7)


def test_a_state_is_not_cropped() -> None:
    cache, new = filled(), StateCache()
    new.crop(0)
    cache.crop(5)
    for length, error, message in (
        (4, headwise.UnsupportedError, "crop to 4 of 5 tokens: a state cannot give up a token; "),
        (0, headwise.UnsupportedError, "reset it and read the tokens again"),
        (6, headwise.ShapeError, "crop to 6 tokens, expected 0 to 5"),
        (-1, headwise.ShapeError, "crop to -1 tokens"),
    ):
        with pytest.raises(error, match=message) as caught:
            cache.crop(length)
        assert "\n" not in str(caught.value)
    assert cache.length == 5


def test_a_copy_is_its_own_and_a_reset_forgets() -> None:
    cache = filled(lengths=[1, 5, 3])
    twin = copy.copy(cache)
    assert twin.state is not None and cache.state is not None
    assert torch.equal(twin.state, cache.state)
    cache.state.zero_()
    cache.count(1)
    assert bool(twin.state.any()) and (twin.starts, twin.length) == ([1, 5, 3], 5)
    cache.reset()
    assert (cache.nbytes, cache.length, cache.starts, cache.batch) == (0, 0, None, None)


def test_what_is_held_can_be_changed_outside_inference_mode() -> None:
    with torch.inference_mode():
        cache = filled()
        cache.select(torch.tensor([1, 0]))
    assert cache.state is not None and cache.inputs is not None
    cache.state.zero_()
    cache.inputs.zero_()


def test_it_moves_to_another_device() -> None:
    cache = filled()
    cache.to("meta")
    assert cache.state is not None and cache.inputs is not None
    assert {cache.state.device.type, cache.inputs.device.type} == {"meta"}
