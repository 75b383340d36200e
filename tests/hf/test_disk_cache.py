"""Caches on disk in Transformers: the tokens of those in memory, in as much memory as is said."""

import copy
import gc
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise
from families import VOCABULARY, make
from headwise.caches import DiskCache
from headwise.hf import cache_nbytes, use_own_layers
from headwise.hf.stock_names import DynamicCache
from hf.test_attach_caches import MODELS, MODES, TEXT, _logits, _modes

PIECES: tuple[tuple[int, ...], ...] = ((), (19, 1, 7))
TRIALS = int(os.environ.get("HEADWISE_TRIALS", "300")) // 10


def long_text(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MODELS)
def test_every_generation_mode_gives_what_the_cache_in_memory_does(
    family: str, tmp_path: Path
) -> None:
    model = make(family)
    headwise.attach(model)
    expected = {mode: MODES[mode](model) for mode in _modes(family)}
    decodes = family != "t5"
    logits = [_logits(model, TEXT, pieces) for pieces in PIECES if decodes]
    for limit in (None, "1MB"):
        report = headwise.attach(model, cache=f"disk:{tmp_path}", cache_limit=limit, sparse="all")
        for mode, tokens in expected.items():
            assert torch.equal(MODES[mode](model), tokens), (limit, mode)
        for pieces, those in zip(PIECES, logits, strict=False):
            assert torch.equal(_logits(model, TEXT, pieces), those)
    assert f"in files in {tmp_path}, at most 977 KiB of them in memory" in report.cache
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cold", [False, True])
def test_a_step_reads_the_keys_that_the_same_choice_in_memory_gives(
    cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "topk:24,sinks=2,recent=4,dense=1"
    model, text = make("llama-gqa"), long_text(150, batch=2)
    headwise.attach(model, sparse=asked, cache="paged")
    expected = _logits(model, text, (140,))
    report = headwise.attach(model, sparse=asked, cache=f"disk:{tmp_path}", cache_limit="200kB")
    read: list[list[int]] = []
    if cold:
        monkeypatch.setattr("headwise.caches.resident.Resident.reads_ahead", True)
        ahead = headwise.caches.disk_pools.DiskPools.read_ahead
        note = lambda pools, pages: (read.append(list(pages)), ahead(pools, pages))  # noqa: E731
        monkeypatch.setattr("headwise.caches.disk_pools.DiskPools.read_ahead", note)
    given = _logits(model, text, (140,))
    # whether a layer is one operator or two changes the order of sums alone
    torch.testing.assert_close(given, expected, atol=0 if not cold else 1e-4, rtol=0)
    assert all(layer.cache == f"disk:{tmp_path}" for layer in report.layers)
    assert bool(read) == cold
    assert all(pages == sorted(set(pages)) for pages in read)


def test_a_cache_on_disk_chooses_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    model, disk = make("llama-gqa"), f"disk:{tmp_path}"
    chosen = "the 1,024 keys that weigh most by a sketch"
    assert chosen in str(headwise.attach(model, cache=disk))
    assert chosen not in str(headwise.attach(model, cache=disk, sparse="all"))
    assert chosen not in str(headwise.attach(model, sparse="all"))


def resident_bytes(folder: Path) -> int:
    """Of files in a folder, those without a name among them, as this process has them mapped."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_no_more_is_in_memory_than_the_limit_says(tmp_path: Path) -> None:
    model, tokens = make("llama-gqa", num_hidden_layers=12), 3_000
    headwise.attach(model)
    with torch.no_grad():
        whole = cache_nbytes(model(long_text(tokens), use_cache=True).cache)
        limit = whole // 4
        headwise.attach(
            model, cache=f"disk:{tmp_path}", cache_limit=limit, sparse="topk:80,recent=8,dense=1"
        )
        held = model(long_text(tokens), use_cache=True).cache
        for token in long_text(30)[0]:
            model(token.view(1, 1), cache=held)
            sketches = sum(layer.sketch.nbytes for layer in held.layers)
            assert 0 < resident_bytes(tmp_path) <= limit - sketches
    assert cache_nbytes(held) > whole


def test_a_limit_that_cannot_be_kept_is_told_in_one_line_and_changes_nothing(
    tmp_path: Path,
) -> None:
    model, text = make("llama-gqa"), long_text(700)
    headwise.attach(model, cache=f"disk:{tmp_path}", cache_limit="70kB")
    with torch.no_grad():
        held = model(text[:, :200], use_cache=True).cache
        with pytest.raises(headwise.CapacityError) as caught:
            model(text[:, 200:], cache=held)
        told = r"cache_limit is 70,000 bytes, and sketches of [\d,]+ with a layer's rows of [\d,]+ "
        assert re.fullmatch(told + r"do not fit: expected at least [\d,]+", str(caught.value))
        assert held.layers[0].cache.length == 200
        twin = model(text[:, :200], use_cache=True).cache
        given, expected = (model(text[:, 200:210], cache=at).logits for at in (held, twin))
    assert torch.equal(given, expected)


def test_a_full_disk_is_told_in_one_line_and_the_cache_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make("llama-gqa"), long_text(400)
    headwise.attach(model, cache=f"disk:{tmp_path}", sparse="all")
    with torch.no_grad():
        held = model(text[:, :50], use_cache=True).cache
        with monkeypatch.context() as patched:

            def full(*arguments: int) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(headwise.CapacityError, match=r"need .* more, and .* are free"):
                model(text[:, 50:], cache=held)
        assert [layer.cache.length for layer in held.layers] == [50] * len(held.layers)
        given = model(text[:, 50:], cache=held).logits
        headwise.attach(model)
        expected = _logits(model, text, (50, 350))[:, 50:]
    assert torch.equal(given, expected)


def test_a_disk_is_full_when_it_is_and_not_when_what_is_taken_ahead_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, taken = make("llama-gqa"), long_text(400), list[int]()
    headwise.attach(model, cache=f"disk:{tmp_path}", sparse="all")
    page = 64 * 2 * 2 * 8 * 4  # tokens, keys and values, heads, their size, bytes
    real = os.posix_fallocate

    def small(file: int, offset: int, size: int) -> None:
        if offset + size > 7 * page:
            raise OSError(28, "No space left on device")
        taken.append(offset + size)
        real(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    with torch.no_grad():
        held = model(text[:, :300], use_cache=True).cache  # 5 pages, which would be doubled
        given = [model(text[:, at : at + 1], cache=held).logits for at in range(300, 400)]
        assert max(taken) == 7 * page
        headwise.attach(model)
        expected = _logits(model, text, (300, *[1] * 100))[:, 300:]
        assert torch.equal(torch.cat(given, dim=1), expected)


@pytest.mark.parametrize("before", [0, 50])
def test_a_disk_that_is_full_at_a_later_layer_spoils_the_cache(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, left = make("llama-gqa"), long_text(400), [1]
    headwise.attach(model, cache=f"disk:{tmp_path}", sparse="all")
    real = os.posix_fallocate

    def nearly_full(*arguments: int) -> None:
        if not left.pop():
            raise OSError(28, "No space left on device")
        real(*arguments)

    with torch.no_grad():
        held: Any = use_own_layers(DynamicCache(config=model.config), model._headwise.choice)
        if before:
            model(text[:, :before], cache=held)
        left[:] = [0, 0, 1]  # the second layer has no room, not even for what it must have
        monkeypatch.setattr(os, "posix_fallocate", nearly_full)
        with pytest.raises(headwise.CapacityError, match=r"need .* more, and .* are free"):
            model(text[:, before:], cache=held)
        monkeypatch.undo()
        # the first layer holds what the others do not
        with pytest.raises(headwise.CapacityError, match=r"failed after .* make a new one"):
            model(text[:, before:], cache=held)
        held.reset()
        given = model(text, cache=held).logits
        headwise.attach(model)
        assert torch.equal(given, model(text).logits)


@pytest.mark.parametrize("family", ["llama-gqa", "kimi_linear"])
def test_a_folder_that_is_gone_and_a_state_that_has_read_are_no_way_round(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, folder = make(family), long_text(400), tmp_path / "cache"
    headwise.attach(model, cache=f"disk:{folder}", sparse="all")
    with torch.no_grad():
        held = model(text[:, :50], use_cache=True).cache
        folder.rmdir()

        def full(*arguments: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(headwise.CapacityError, match=r"need .* more, and .* are free"):
            model(text[:, 50:], cache=held)
        monkeypatch.undo()
        if family == "kimi_linear":  # layers before it have a state
            with pytest.raises(headwise.CapacityError, match=r"failed after .* make a new one"):
                model(text[:, 50:], cache=held)
            return
        given = model(text[:, 50:], cache=held).logits
        headwise.attach(model)
        assert torch.equal(given, _logits(model, text, (50, 350))[:, 50:])


def test_a_sketch_without_room_spoils_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make("llama-gqa"), long_text(150)
    headwise.attach(model, cache="paged", sparse="topk:24,sinks=2,recent=4,dense=0")
    with torch.no_grad():
        held = model(text[:, :-1], use_cache=True).cache
        monkeypatch.setattr(type(held.layers[1].sketch), "means", None)
        with pytest.raises(TypeError):
            model(text[:, -1:], cache=held)
        monkeypatch.undo()
        with pytest.raises(headwise.CapacityError, match=r"failed after .* make a new one"):
            model(text[:, -1:], cache=held)


def test_a_fork_does_not_write_into_the_rows_of_its_parent(tmp_path: Path) -> None:
    cache, row = DiskCache(tmp_path), torch.ones(1, 2, 70, 16)
    cache.append(row, row)
    process = os.fork()
    if not process:
        status = 1
        try:
            cache.crop(60)
            cache.append(0 * row, 0 * row)
        except headwise.UnsupportedError as error:
            status = 0 if "the process that made it alone" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0
    assert bool((cache.rows(0, 0, 70)[0] == 1).all())
    cache.append(row, row)


def test_a_view_can_be_copied_and_pickled(tmp_path: Path) -> None:
    cache, rows = DiskCache(tmp_path), torch.randn(2, 1, 2, 70, 16)
    empty = cache.append(*rows[..., :0, :])
    kv = cache.append(*rows)
    for twin in (copy.deepcopy(kv), pickle.loads(pickle.dumps(kv))):
        assert all(map(torch.equal, twin.dense(torch.float32), kv.dense(torch.float32)))
    assert pickle.loads(pickle.dumps(empty)).shape == empty.shape


def test_pages_of_one_row_hold_tokens_of_two_dtypes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, page_size=1)
    key, value = torch.randn(1, 3, 9, 5).half(), torch.randn(1, 3, 9, 3)
    cache.append(key, value)
    assert all(map(torch.equal, cache.rows(0, 0, 9), (key[0], value[0])))


def test_saving_and_copying_keep_to_the_limit(tmp_path: Path) -> None:
    model, text = make("llama-gqa", max_position_embeddings=9000), long_text(6000)
    headwise.attach(model, cache=f"disk:{tmp_path}", cache_limit="1.2MB", sparse="all")
    with torch.no_grad():
        held = model(text[:, :5990], use_cache=True).cache
        held.save(tmp_path / "kept.safetensors")
        assert resident_bytes(tmp_path) <= 1_200_000
        twin = copy.deepcopy(held)
        assert resident_bytes(tmp_path) <= 1_200_000
        model(text[:, 5990:], cache=twin)
        assert resident_bytes(tmp_path) <= 1_200_000


def test_a_file_that_the_system_does_not_let_grow(tmp_path: Path) -> None:
    """In a process of its own: what a disk with a quota says, by the system's own limit."""
    program = f"""
import resource
import torch
from headwise.caches import DiskCache
from headwise import CapacityError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
cache, row = DiskCache({str(tmp_path)!r}), torch.ones(1, 2, 64, 64)
for count in range(1000):
    try:
        cache.append(row, row)
    except CapacityError as error:
        assert cache.length == 64 * count and bool((cache.rows(0, 0, 64 * count)[0] == 1).all())
        print(count, error)
        break
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, told = done.stdout.split(" ", 1)
    assert 8 <= int(count) <= 16  # pages of 64 KiB; room is taken ahead
    expected = rf"a layer's rows in {tmp_path} need [\d,]+ bytes more, .*File too large\n"
    assert re.fullmatch(expected, told)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    drawn = random.Random(5)
    for _ in range(TRIALS):
        process = os.fork()
        if not process:
            try:
                while True:
                    cache, row = DiskCache(tmp_path), torch.ones(1, 2, 70, 16)
                    for _ in range(9):
                        cache.append(row, row)
                        copy.deepcopy(cache)
            finally:
                os._exit(1)
        time.sleep(drawn.random() * 0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not list(tmp_path.iterdir())


def test_copies_files_and_detach_do_as_for_other_caches(tmp_path: Path) -> None:
    model, text = make("llama-gqa"), long_text(90)
    headwise.attach(model, cache=f"disk:{tmp_path}", sparse="all")
    with torch.no_grad():
        held = model(text[:, :70], use_cache=True).cache
        expected = model(text[:, 70:], cache=copy.deepcopy(held)).logits
        held.save(tmp_path / "kept.safetensors")
        loaded = headwise.load_cache(tmp_path / "kept.safetensors", model)
        assert torch.equal(model(text[:, 70:], cache=loaded).logits, expected)
        held.crop(-30)
        assert torch.equal(model(text[:, 40:], cache=held).logits[:, 30:], expected)
        assert held.layers[0].cache.name == f"disk:{tmp_path}"
        headwise.detach(model)
        held.crop(-20)
        # stock's attention gathers the rows
        torch.testing.assert_close(
            model(text[:, 70:], cache=held).logits, expected, atol=1e-4, rtol=0
        )


BAD = [
    ({"cache": "disk:"}, "cache is 'disk:', expected one of"),
    ({"cache": "disk"}, "cache is 'disk', expected one of"),
    ({"cache": "disk:{file}"}, "cache is 'disk:{file}': File exists"),
    ({"cache": "disk:{file}/inside"}, "cache is 'disk:{file}/inside': Not a directory"),
    ({"cache": "disk:{folder}", "cache_limit": "much"}, "cache_limit is 'much', expected a size"),
    ({"cache": "disk:{folder}", "cache_limit": 0}, "cache_limit is 0, expected a size"),
    ({"cache_limit": "1GB"}, "cache_limit is for a cache in a folder, and cache is 'contiguous'"),
    ({"cache": "disk:{folder}", "remember": "{folder}"}, "remember= keeps what was read in memory"),
]


@pytest.mark.parametrize(("asked", "told"), BAD)
def test_what_cannot_be_is_refused_in_one_line(
    asked: dict[str, str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path)}
    model = make("llama-gqa")
    given: dict[str, Any] = {
        key: text.format(**places) if isinstance(text, str) else text for key, text in asked.items()
    }
    with pytest.raises(headwise.OptionError) as caught:
        headwise.attach(model, **given)
    assert str(caught.value).startswith(told.format(**places))
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == "sdpa"


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(headwise.OptionError, match=f"^cache is 'disk:{tmp_path}': .*writable"):
        headwise.attach(make("llama-gqa"), cache=f"disk:{tmp_path}")


def test_a_model_whose_layers_cannot_choose_says_so(tmp_path: Path) -> None:
    with pytest.raises(headwise.UnsupportedError, match="no layer of Deepseek"):
        headwise.attach(make("deepseek_v3"), cache=f"disk:{tmp_path}")
