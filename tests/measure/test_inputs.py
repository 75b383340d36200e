"""Cold caches: how many copies of a call's tensors are made, and that they are apart."""

from pathlib import Path

import pytest
import torch

from headwise.errors import CapacityError
from headwise.measure import inputs as module
from headwise.measure import parse_shape
from headwise.measure.environment import last_level_cache
from headwise.measure.inputs import check_fits, make_cold, make_inputs

SHAPE = parse_shape("decode:6/2:d16:47")
BYTES = 2 * 2 * 16 * 47 * 2  # K and V of 2 kv heads in bfloat16


def test_copies_together_hold_twice_the_cache_and_each_its_own_memory() -> None:
    made = make_cold(make_inputs(SHAPE, torch.bfloat16), cache=10 * BYTES, memory=2**30)
    assert len(made.copies) == 20
    assert made.cold
    assert made.note() == ""
    assert len({each.rows[0].data_ptr() for each in made.copies}) == 20
    assert all(torch.equal(each.rows[1], made.copies[0].rows[1]) for each in made.copies)


def test_little_memory_means_fewer_copies_and_a_note() -> None:
    made = make_cold(make_inputs(SHAPE, torch.bfloat16), cache=10 * BYTES, memory=20 * BYTES)
    assert len(made.copies) == 5
    assert not made.cold
    assert made.note().startswith("caches not cold")


def test_a_cache_of_unknown_size_is_said_to_be_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_level_cache", lambda: None)
    made = make_cold(make_inputs(SHAPE, torch.bfloat16), memory=20 * BYTES)
    assert "(assumed)" in made.note()


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda device: 4 * BYTES)
    check_fits(SHAPE, torch.bfloat16)
    with pytest.raises(CapacityError, match="needs 12 KiB for one copy of its cache, more"):
        check_fits(SHAPE, torch.float32)


def test_the_last_level_cache_is_the_one_of_the_highest_level(tmp_path: Path) -> None:
    caches = [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "36M")]
    for index, values in enumerate(caches):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values):
            (folder / name).write_text(value + "\n")
    assert last_level_cache(tmp_path) == 36 * 2**20
    assert last_level_cache(tmp_path / "none") is None
