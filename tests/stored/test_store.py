"""The folder of blocks: what is found of a text, what is stored of it, and what goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headwise.base.mapped import reserve
from headwise.stored.file import PART, Contents
from headwise.stored.layout import PAGE, PageLayout, Rows
from headwise.stored.origin import Origin
from headwise.stored.store import BLOCK, Store, all_blocks, make_room

ORIGIN = Origin("Model", "float32", "exact", "{}", "config", "weights")
LAYOUT = PageLayout((Rows(0, "first", torch.int64, 1, 1),))


def put(store: Store, text: torch.Tensor, *, fixed: bool = False) -> int:
    """Store what is missing of a text; a token's row is the token. How many blocks that were."""
    missing = store.missing(text, fixed=fixed)
    for begin, end, parent in missing:
        pages = []
        for at in range(begin, end, PAGE):
            page = bytearray(LAYOUT.page_bytes)
            LAYOUT.fill(page, {(0, "first"): text[None, at : min(at + PAGE, end), None]})
            pages.append(page)
        store.put(
            Contents(
                origin=store.origin,
                layers=({"kind": "rows"},),
                layout=LAYOUT,
                tokens=text[None, begin:end],
                real=torch.ones(1, end - begin, dtype=torch.bool),
                table=torch.arange(len(pages), dtype=torch.int32)[None],
                start=begin,
                parent=parent,
            ),
            pages,
            {"1.state": text[None, :1]} if fixed and end == len(text) else {},
        )
    return len(missing)


def rows(store: Store, text: torch.Tensor, *, fixed: bool = False) -> torch.Tensor:
    """The rows that are known of a text."""
    found = store.find(text)
    length = max(found.points, default=0) if fixed else found.reach
    known = []
    for match in found.take(length, fixed=fixed):
        memory = reserve(match.file.pages * LAYOUT.page_bytes, "a test")
        match.file.map(memory, 0, 0, match.file.pages)
        pool = LAYOUT.pools(memory)[0, "first"]
        known.append(pool.flatten()[: match.count])
    return torch.cat(known) if known else torch.empty(0, dtype=torch.int64)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1000, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 63, 64, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 70])
def test_a_text_is_found_again(tmp_path: Path, length: int) -> None:
    store, own = Store(tmp_path, ORIGIN), text(length)
    assert store.find(own).reach == 0
    assert put(store, own) == -(-length // BLOCK)
    assert torch.equal(rows(store, own), own)
    assert put(store, own) == 0


@pytest.mark.parametrize("common", [1, 100, BLOCK, BLOCK + 17, 2 * BLOCK + 255])
def test_what_two_texts_have_in_common_is_found(tmp_path: Path, common: int) -> None:
    store, own = Store(tmp_path, ORIGIN), text(3 * BLOCK)
    put(store, own)
    other = torch.cat([own[:common], own[common:] + 1])
    assert torch.equal(rows(store, other), own[:common])
    put(store, other)
    assert torch.equal(rows(store, other), other)
    assert torch.equal(rows(store, own), own)


def test_a_longer_block_takes_the_place_of_a_shorter_one(tmp_path: Path) -> None:
    store, own = Store(tmp_path, ORIGIN), text(100)
    for length in (30, 64, 100):
        put(store, own[:length])
    assert [used.entry.count for used in all_blocks(tmp_path)] == [100]


def test_what_is_beside_rows_is_found_where_it_was_stored(tmp_path: Path) -> None:
    store, own = Store(tmp_path, ORIGIN), text(2 * BLOCK + 50)
    for length in (BLOCK + 20, 2 * BLOCK + 10):
        put(store, own[:length], fixed=True)
    assert store.find(own).points == {BLOCK + 20, 2 * BLOCK + 10}
    assert torch.equal(rows(store, own, fixed=True), own[: 2 * BLOCK + 10])
    assert torch.equal(rows(store, own[: 2 * BLOCK], fixed=True), own[: BLOCK + 20])
    put(store, own)  # rows alone, which do not take the place of what has more
    assert store.find(own).points == {BLOCK + 20, 2 * BLOCK + 10}


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    own = text(100)
    put(Store(tmp_path, ORIGIN), own)
    other = Origin(**{**ORIGIN.as_json(), "weights": "others"})
    assert Store(tmp_path, other).find(own).reach == 0


def test_a_name_alone_is_not_believed(tmp_path: Path) -> None:
    """A file under the name of another text's block: its tokens are compared."""
    store, own, other = Store(tmp_path, ORIGIN), text(100), text(100, 1)
    put(store, own)
    put(store, other)
    one, two = (used.entry.path for used in all_blocks(tmp_path))
    os.replace(one, two)
    for each in (own, other):
        assert torch.equal(rows(store, each), each[: store.find(each).reach])
    assert sorted([store.find(own).reach, store.find(other).reach]) == [0, 100]


def test_the_same_block_of_another_text_is_not_taken(tmp_path: Path) -> None:
    """Two texts that differ in their first blocks alone, the files of their second ones swapped."""
    store, first, second = Store(tmp_path, ORIGIN), text(BLOCK), text(BLOCK, 1)
    texts = [torch.cat([each, text(60, 2)]) for each in (first, second)]
    for each in texts:
        put(store, each)
    one, two = (used.entry.path for used in all_blocks(tmp_path) if used.entry.start)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert [store.find(each).reach for each in texts] == [BLOCK, BLOCK]


def test_of_a_text_the_last_blocks_go_first(tmp_path: Path) -> None:
    store, own = Store(tmp_path, ORIGIN), text(5 * BLOCK)
    put(store, own)
    store.touch(own)
    one = all_blocks(tmp_path)[0].nbytes
    make_room(tmp_path, 3 * one)
    assert store.find(own).reach == 3 * BLOCK


def test_a_damaged_block_is_passed_over_and_removed(tmp_path: Path) -> None:
    store, own = Store(tmp_path, ORIGIN), text(2 * BLOCK)
    put(store, own)
    second = max((used.entry for used in all_blocks(tmp_path)), key=lambda entry: entry.start)
    second.path.write_bytes(second.path.read_bytes()[:5000])
    found = store.find(own)
    assert found.reach == BLOCK
    assert len(found.damaged) == 1
    assert not second.path.exists()
    assert put(store, own) == 1
    assert store.find(own).reach == 2 * BLOCK


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, ORIGIN)
    texts = [text(2 * BLOCK, seed) for seed in range(3)]
    for age, each in zip((30, 10, 20), texts, strict=True):
        put(store, each)
        for match in store.find(each).take(2 * BLOCK, fixed=False):
            os.utime(match.file.path, (1e9 - age, 1e9 - age))
    one = all_blocks(tmp_path)[0].nbytes
    assert make_room(tmp_path, 3 * one) == 3
    assert [store.find(each).reach for each in texts] == [0, 2 * BLOCK, BLOCK]


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    store = Store(tmp_path, ORIGIN)
    put(store, text(10))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    nobody = store.folder / f"{PART}{ended.pid}-x"
    own = store.folder / f"{PART}{os.getpid()}-x"
    for part in (nobody, own):
        part.write_bytes(b"x")
    make_room(tmp_path, 10**9)
    assert not nobody.exists()
    assert own.exists()


@pytest.mark.skipif(os.name == "nt", reason="modes of files are POSIX's")
def test_only_its_user_may_look_into_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", ORIGIN)
    put(store, text(10))
    for path, mode in ((tmp_path / "new", 0o700), (store.folder, 0o700)):
        assert path.stat().st_mode & 0o777 == mode
    assert all(
        used.entry.path.stat().st_mode & 0o777 == 0o600 for used in all_blocks(tmp_path / "new")
    )


def test_what_is_not_a_block_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, ORIGIN)
    put(store, text(10))
    stranger = store.folder / "notes.txt"
    stranger.write_text("mine")
    (tmp_path / "other").mkdir()
    assert len(all_blocks(tmp_path)) == 1
    make_room(tmp_path, 0)
    assert stranger.read_text() == "mine"
    assert not all_blocks(tmp_path)
