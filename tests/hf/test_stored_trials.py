"""Trials of damage: whatever happens to a stored cache, the tokens are right, or one line says no.

300 of them here, HEADWISE_TRIALS of them in `make nightly`.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import headwise
from headwise.errors import LoadError
from headwise.hf.stock_names import CACHE
from headwise.stored.origin import Origin
from headwise.stored.store import BLOCK, Store, all_blocks, make_room
from stored.test_store import ORIGIN, put, rows, text

TRIALS = int(os.environ.get("HEADWISE_TRIALS", "300"))
NEW = 3


def model_of(seed: int = 0) -> Any:
    """Small, and with a window beside full attention."""
    torch.manual_seed(seed)
    config = hf.Gemma2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=40,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return hf.Gemma2ForCausalLM(config).eval()


def tokens_of(model: Any, ids: Tensor, **arguments: Any) -> list[int]:
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    tokens: list[int] = model.generate(ids, **given, **arguments)[0].tolist()
    return tokens


TEXTS = [
    torch.randint(3, 60, (1, n), generator=torch.Generator().manual_seed(n))
    for n in (30, 90, 300, 300 + BLOCK)
]
TEXTS += [torch.cat([TEXTS[3][:, :270], TEXTS[1]], dim=1), TEXTS[2][:, :299]]


def damage(random: random.Random, paths: list[Path]) -> str:
    """Do something to one of the files."""
    path = random.choice(paths)
    size = path.stat().st_size
    kinds = ("flipped", "header", "cut", "gone", "swapped", "garbage", "longer", "pipe", "part")
    kind = random.choice(kinds)
    if kind in ("flipped", "header"):
        data = bytearray(path.read_bytes())
        data[random.randrange(size if kind == "flipped" else min(size, 4096))] ^= (
            1 << random.randrange(8)
        )
        replace(path, bytes(data))
    elif kind == "cut":
        replace(path, path.read_bytes()[: random.randrange(size)])
    elif kind == "gone":
        path.unlink()
    elif kind == "swapped":
        other = random.choice(paths)
        replace(path, other.read_bytes())
    elif kind == "garbage":
        replace(path, random.randbytes(random.randrange(9000)))
    elif kind == "longer":
        replace(path, path.read_bytes() + b"x")
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        (path.parent / f".headwise-part-{2**22 + 1}-x").write_bytes(b"x")
    return kind


def replace(path: Path, data: bytes) -> None:
    """Another file under the name: what is mapped of the old one stays."""
    part = path.with_name("damaged")
    part.write_bytes(data)
    os.replace(part, path)


@pytest.mark.skipif(os.name == "nt", reason="pipes and forks are POSIX's")
def test_a_damaged_folder_gives_no_wrong_token(tmp_path: Path) -> None:
    drawn, folder = random.Random(0), tmp_path / "folder"
    twins = [model_of(seed) for seed in (0, 1)]
    expected = {(s, i): tokens_of(twins[s], t) for s in (0, 1) for i, t in enumerate(TEXTS)}
    models = [model_of(seed) for seed in (0, 1)]
    reports = [headwise.attach(model, remember=folder) for model in models]
    known = 0
    for trial in range(TRIALS):
        which, each = drawn.randrange(len(TEXTS)), drawn.randrange(2)
        paths = [used.entry.path for used in all_blocks(folder) if used.entry.path.is_file()]
        what = damage(drawn, paths) if paths and drawn.random() < 0.7 else "nothing"
        got = tokens_of(models[each], TEXTS[which])
        assert got == expected[each, which], f"trial {trial}: {what}"
        known += reports[each].remembered.known > 0
        if drawn.random() < 0.05:
            shutil.rmtree(folder, ignore_errors=True)
        if drawn.random() < 0.05:
            make_room(folder, 50_000)
    assert known > TRIALS // 5, "nearly nothing was remembered, so that nearly nothing was tried"


def loaded_or_one_line(path: Path, model: Any) -> Any:
    """The cache, or what is said where there is none."""
    try:
        return headwise.load_cache(path, model)
    except LoadError as error:
        return str(error)


@pytest.mark.skipif(os.name == "nt", reason="pipes and forks are POSIX's")
def test_a_damaged_file_gives_no_wrong_token(tmp_path: Path) -> None:
    drawn, path = random.Random(1), tmp_path / "cache"
    model = model_of()
    headwise.attach(model)
    ids = TEXTS[2]
    with torch.no_grad():
        cache = model(ids[:, :200], use_cache=True)[CACHE]
    headwise.save_cache(cache, path)
    whole, expected = path.read_bytes(), tokens_of(model, ids)
    refused = 0
    for trial in range(TRIALS):
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        what = damage(drawn, [path])
        loaded = loaded_or_one_line(path, model)
        refused += isinstance(loaded, str)
        if isinstance(loaded, str):
            assert "\n" not in loaded
            continue
        assert tokens_of(model, ids, **{CACHE: loaded}) == expected, f"trial {trial}: {what}"
    assert refused > TRIALS // 3


def test_a_changed_value_is_another_model(tmp_path: Path) -> None:
    """One value of one weight, and back again: what was stored of the first is found again."""
    drawn = random.Random(2)
    model, twin = model_of(), model_of()
    report = headwise.attach(model, remember=tmp_path)
    weights = list(zip(model.parameters(), twin.parameters(), strict=True))
    tokens_of(model, TEXTS[1])
    for turn in range(max(5, TRIALS // 30)):
        own, other = drawn.choice(weights)
        at = drawn.randrange(own.numel())
        before = own.detach().flatten()[at].clone()
        with torch.no_grad():
            for weight in (own, other):
                weight.view(-1)[at] += 1.0 + turn / 1024  # a model that never was
        assert tokens_of(model, TEXTS[1]) == tokens_of(twin, TEXTS[1])
        assert report.remembered.known == 0
        with torch.no_grad():
            for weight in (own, other):
                weight.view(-1)[at] = before
        assert tokens_of(model, TEXTS[1]) == tokens_of(twin, TEXTS[1])
        assert report.remembered.known == TEXTS[1].shape[1] - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed after a fork")
def test_two_writers_that_are_killed_leave_nothing_wrong(tmp_path: Path) -> None:
    drawn, store = random.Random(3), Store(tmp_path, ORIGIN)
    texts = [text(3 * BLOCK, seed) for seed in range(4)]
    texts += [torch.cat([texts[0][:300], each]) for each in texts]
    for _ in range(max(10, TRIALS // 10)):
        writers = [child(store, texts, seed) for seed in range(2)]
        time.sleep(drawn.random() * 0.03)
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        for each in texts:
            assert torch.equal(rows(store, each), each[: store.find(each).reach])
        if drawn.random() < 0.3:
            make_room(tmp_path, 200_000)
    make_room(tmp_path, 10**9)
    assert not list(tmp_path.glob("*/.headwise-part-*"))
    for each in texts:
        put(store, each)
        assert torch.equal(rows(store, each), each)


def child(store: Store, texts: list[Tensor], seed: int) -> int:
    """A process that writes until it is killed, and never goes on with the test."""
    process = os.fork()
    if process:
        return process
    drawn, began = random.Random(seed), time.monotonic()
    try:
        while time.monotonic() < began + 10:
            each = drawn.choice(texts)
            put(store, each[: drawn.randrange(1, len(each))])
            if drawn.random() < 0.1:
                make_room(store.root, 100_000)
    finally:
        os._exit(1)
    return 0


def test_a_full_disk_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = model_of(), model_of()
    report = headwise.attach(model, remember=tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwise.stored.file.os.replace", full)
    assert tokens_of(model, TEXTS[1]) == tokens_of(twin, TEXTS[1])
    assert report.remembered.notes == ["not everything was stored: No space left on device"]
    assert not [path for path in tmp_path.glob("**/*") if path.is_file()]


def test_the_origin_of_the_store_is_compared(tmp_path: Path) -> None:
    """A block under the right name that says another origin inside."""
    store, own = Store(tmp_path, ORIGIN), text(100)
    put(store, own)
    other = Store(tmp_path, Origin(**{**ORIGIN.as_json(), "weights": "others"}))
    other.folder.mkdir()
    for used in all_blocks(tmp_path):
        shutil.copy(used.entry.path, other.folder / used.entry.path.name)
    assert other.find(own).reach == 0
