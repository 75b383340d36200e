"""The tasks: what is asked can be answered from the sequence, and held-out data stays held out."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import OptionError
from headwise.comparison import Configuration
from headwise.comparison.beyond import BeyondTask
from headwise.comparison.recall import RecallTask, sequences
from headwise.comparison.task import IGNORED
from headwise.comparison.text import TextTask, read


@given(
    count=st.integers(1, 5),
    pairs=st.integers(1, 17),
    more=st.integers(2, 23),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_every_key_is_asked_once_and_its_target_is_its_value(
    count: int, pairs: int, more: int, seed: int
) -> None:
    vocabulary = 2 * pairs + more
    batch = sequences(count, pairs, vocabulary, torch.Generator().manual_seed(seed))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist()):
        given_pairs = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]))
        assert len(given_pairs) == pairs == len(set(given_pairs.values()))
        assert max(given_pairs) < vocabulary // 2 <= min(given_pairs.values())
        asked = {tokens[at]: target for at, target in enumerate(targets) if target != IGNORED}
        assert asked == given_pairs
        assert targets[: 2 * pairs] == [IGNORED] * 2 * pairs


def test_training_goes_from_few_pairs_to_all_with_the_same_tokens_a_step() -> None:
    task = RecallTask(Configuration(pairs=24, steps=12, batch=768))
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(task.batch(step, generator).tokens.shape) for step in range(12)]
    assert shapes[5] == (64, 12)
    assert shapes[6] == (32, 24)
    assert shapes[-1] == (8, 96)
    assert {rows * length for rows, length in shapes} == {768}


def test_with_few_pairs_every_step_has_them_all() -> None:
    task = RecallTask(Configuration(pairs=3, steps=5))
    assert {task.pairs_at(step) for step in range(5)} == {3}


def test_held_out_recall_is_the_same_each_time_and_has_all_pairs() -> None:
    task = RecallTask(Configuration(pairs=6))
    first, again = task.held_out(), task.held_out()
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again))
    assert sum(len(batch.tokens) for batch in first) == 512
    assert task.baseline == 1 / 6


@given(pairs=st.integers(1, 9), more=st.integers(0, 99), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_what_is_asked_beyond_lies_five_eighths_of_the_sequence_away(
    pairs: int, more: int, seed: int
) -> None:
    asked = Configuration(task="beyond", pairs=pairs, length=16 * pairs + more, vocabulary=40)
    task = BeyondTask(asked)
    batch = task.sequences(3, pairs, asked.length, torch.Generator().manual_seed(seed))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist()):
        given_pairs = dict(zip(tokens[0 : 4 * pairs : 2], tokens[1 : 4 * pairs : 2]))
        assert len(given_pairs) == pairs == len(set(given_pairs.values()))
        places = [at for at, target in enumerate(targets) if target != IGNORED]
        near, far = places[:pairs], places[pairs:]
        for group in (near, far):
            assert {tokens[at]: targets[at] for at in group} == given_pairs
        assert max(near) < 4 * pairs <= asked.length - 2 * pairs <= min(far)
        assert min(far) - 4 * pairs >= asked.length * 5 // 8 - 1
        # no key stands between with another value
        assert not set(given_pairs) & set(tokens[4 * pairs : -2 * pairs])
        # a few are shown twice within an eighth of the sequence
        for at in near:
            first = tokens.index(tokens[at])
            assert at - first < max(4, asked.length // 8)


def test_beyond_is_trained_near_and_judged_far_alone() -> None:
    task = BeyondTask(Configuration(task="beyond", steps=12, batch=256))
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(task.batch(step, generator).tokens.shape) for step in range(12)]
    assert (shapes[0], shapes[5], shapes[-1]) == ((16, 16), (16, 16), (2, 128))
    assert {rows * length for rows, length in shapes} == {256}
    first, again = task.held_out(), task.held_out()
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again))
    assert sum(len(batch.tokens) for batch in first) == 512
    assert all((batch.targets[:, :-16] == IGNORED).all() for batch in first)
    assert task.baseline == 1 / 8


def test_a_sequence_too_short_for_its_pairs_is_refused() -> None:
    with pytest.raises(OptionError, match="length is 127, and 8 pairs need at least 128"):
        Configuration(task="beyond", length=127)


def asked(length: int = 10, batch: int = 40) -> Configuration:
    return Configuration(task="text", text="a hash", length=length, batch=batch)


def test_text_predicts_the_next_byte() -> None:
    content = bytes(range(256)) * 4
    batch = TextTask(content, asked()).batch(0, torch.Generator().manual_seed(0))
    assert batch.tokens.shape == (4, 10)
    assert torch.equal((batch.tokens + 1) % 256, batch.targets)


def test_no_training_window_reaches_into_the_held_out_tenth() -> None:
    content = b"a" * 900 + b"b" * 100
    task, generator = TextTask(content, asked()), torch.Generator().manual_seed(0)
    seen = torch.cat([task.batch(step, generator).targets for step in range(200)])
    assert seen.unique().tolist() == [ord("a")]
    assert torch.cat([at.tokens for at in task.held_out()]).unique().tolist() == [ord("b")]


def test_held_out_windows_of_a_long_text_are_spread_and_limited() -> None:
    content = bytes(1_000_000) + bytes(range(256)) * 4000
    held_out = TextTask(content, asked(length=128, batch=128)).held_out()
    assert sum(batch.tokens.numel() for batch in held_out) == 2**17


def test_the_baseline_of_text_is_its_entropy_by_bytes() -> None:
    # four bytes, equally frequent: 2 bits
    task = TextTask(b"abcd" * 100_000, asked())
    assert task.baseline == pytest.approx(2 * 0.6931, abs=0.005)


def test_a_short_text_is_refused_with_what_it_needs() -> None:
    with pytest.raises(OptionError, match="the text has 109 bytes, expected at least 110"):
        TextTask(b"x" * 109, asked())
    assert len(TextTask(b"x" * 110, asked()).held_out()) == 1


def test_a_text_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.txt cannot be read: No such file"):
        read(tmp_path / "none.txt")
