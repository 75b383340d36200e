"""Cache files: what is written is what is read, and whatever is wrong with one is one line."""

import os
import stat
from pathlib import Path

import pytest
import safetensors
import torch

from headwise.base.mapped import reserve
from headwise.errors import LoadError
from headwise.stored.file import PART, CacheFile, Contents, write
from headwise.stored.layout import PAGE, PageLayout, Rows
from headwise.stored.origin import Origin

ORIGIN = Origin("Model", "float32", "exact", "{}", "config", "weights")
LAYOUT = PageLayout(
    (
        Rows(0, "first", torch.float32, 2, 8),
        Rows(0, "second", torch.bfloat16, 1, 3),
        Rows(1, "first", torch.int8, 3, 5),
        Rows(1, "second", torch.float32, 2, 0),
    )
)
FIXED = {"2.first": torch.arange(12.0).view(1, 3, 4), "2.none": torch.empty(1, 0)}


def contents(length: int, batch: int = 1) -> Contents:
    """Of random tokens, in pages of their own."""
    generator = torch.Generator().manual_seed(length)
    pages = -(-length // PAGE)
    return Contents(
        origin=ORIGIN,
        layers=({"kind": "rows", "dtype": "float32"}, {"kind": "rows"}, {"kind": "window"}),
        layout=LAYOUT,
        tokens=torch.randint(99, (batch, length), generator=generator),
        real=torch.ones(batch, length, dtype=torch.bool),
        table=torch.arange(batch * pages, dtype=torch.int32).view(batch, pages),
    )


def random_rows(seed: int) -> dict[tuple[int, str], torch.Tensor]:
    """Of a page."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (rows.layer, rows.name): torch.randint(
            -100, 100, (rows.heads, PAGE, rows.dim), generator=generator
        ).to(rows.dtype)
        for rows in LAYOUT.rows
    }


def written(path: Path, length: int = 150) -> list[dict[tuple[int, str], torch.Tensor]]:
    """A file at `path`, and the rows of its pages."""
    every, pages = [], []
    for index in range(-(-length // PAGE)):
        page = bytearray(LAYOUT.page_bytes)
        every.append(random_rows(index))
        LAYOUT.fill(page, every[-1])
        pages.append(page)
    write(path, contents(length), pages, FIXED)
    return every


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    pages = written(path)
    file = CacheFile(path)
    assert torch.equal(file.contents.tokens, contents(150).tokens)
    assert (file.contents.origin, file.contents.layout) == (ORIGIN, LAYOUT)
    memory = reserve(5 * LAYOUT.page_bytes, "a test")
    file.map(memory, LAYOUT.page_bytes, 1, 2)
    pools = LAYOUT.pools(memory)
    for (layer, name), pool in pools.items():
        assert torch.equal(pool[:, 1], pages[1][layer, name])
        assert torch.equal(pool[:, 2], pages[2][layer, name])
        assert not pool[:, 3:].any()
    fixed = file.fixed()
    assert {name: tensor.tolist() for name, tensor in fixed.items()} == {
        name: tensor.tolist() for name, tensor in FIXED.items()
    }


def test_the_file_does_not_change_where_its_pages_are_written_to(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    written(path)
    before = path.read_bytes()
    file = CacheFile(path)
    memory = reserve(3 * LAYOUT.page_bytes, "a test")
    file.map(memory, 0, 0, 3)
    for pool in LAYOUT.pools(memory).values():
        pool.zero_()
    assert path.read_bytes() == before
    again = reserve(3 * LAYOUT.page_bytes, "a test")
    CacheFile(path).map(again, 0, 0, 3)
    assert LAYOUT.pools(again)[0, "first"].any()


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    written(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.get_tensor("pages").shape == (3, LAYOUT.page_bytes)
        assert torch.equal(file.get_tensor("tokens").long(), contents(150).tokens)


@pytest.mark.skipif(os.name == "nt", reason="modes of files are POSIX's")
def test_only_its_user_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    written(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    def pages():
        yield bytearray(LAYOUT.page_bytes)
        raise OSError(28, "No space left on device")

    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"):
        write(path, contents(150), pages(), FIXED)
    assert path.read_bytes() == b"before"
    assert not list(tmp_path.glob(f"{PART}*"))


@pytest.mark.parametrize("what", ["pages", "checksums", "tokens", "real", "table", "2.first"])
def test_a_flipped_bit_is_found(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cache.safetensors"
    written(path)
    data = bytearray(path.read_bytes())
    file = CacheFile(path)
    begin, end = file._header[what]["data_offsets"]
    data[file._begin + (begin + end) // 2] ^= 4
    path.write_bytes(data)

    def used() -> None:
        damaged = CacheFile(path)
        damaged.fixed()
        damaged.map(reserve(3 * LAYOUT.page_bytes, "a test"), 0, 0, 3)

    with pytest.raises(LoadError, match=r"damaged|do not fit|not a readable"):
        used()


def test_a_file_that_is_cut_short_or_another_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    written(path)
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(LoadError, match=r"cut short|not a readable"):
            CacheFile(path)
    other = tmp_path / "other.safetensors"
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(LoadError, match="not a cache of headwise"):
        CacheFile(other)
    with pytest.raises(LoadError, match="No such file"):
        CacheFile(tmp_path / "none")


def test_sizes_are_looked_at_before_anything_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no model has"):
        PageLayout.read([[0, "first", "F32", 2**40, 2**40]])
    with pytest.raises(LoadError, match="no model has"):
        PageLayout.read([[0, "first", "F32", True, 4]])
    with pytest.raises(LoadError, match="twice"):
        PageLayout.read([[0, "first", "F32", 1, 4], [0, "first", "F32", 1, 4]])


@pytest.mark.parametrize("shape", [(2**20, 0), (0, 2**20)])
def test_sequences_without_tokens_are_refused_at_once(tmp_path: Path, shape: tuple) -> None:
    path, none = tmp_path / "cache", torch.empty(shape, dtype=torch.int64)
    empty = Contents(ORIGIN, (), PageLayout(()), none, none.bool(), torch.empty(shape[0], 0))
    write(path, empty, [], {})
    with pytest.raises(LoadError, match="do not fit one another"):
        CacheFile(path)


def test_what_differs_between_two_models_is_said() -> None:
    other = Origin(**{**ORIGIN.as_json(), "weights": "others"})
    assert ORIGIN.difference(other) == "its weights is weights, not others"
    assert ORIGIN.difference(ORIGIN) is None
    assert other.key != ORIGIN.key
