"""What is read from outside: anything wrong with it is one line, and nothing waits for ever."""

import contextlib
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli.checkpoints import save_tiny
from headwise.base.files import cache_folder, read_json, read_text
from headwise.base.written import check_writable
from headwise.comparison import Configuration
from headwise.comparison.folder import ComparisonFolder
from headwise.comparison.text import read as read_corpus
from headwise.conversion.checkpoint.weights import StoredWeights
from headwise.conversion.checkpoint.workspace import file_digest
from headwise.errors import HeadwiseError, LoadError, OptionError
from headwise.generation.text import read_document
from headwise.loading.load import load
from headwise.loading.model_folder import model_folder
from headwise.loading.weight_files import weight_bytes
from headwise.measure.figures_store import kept_figures
from headwise.planning.model import find_model

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def refused(read: Callable[[], object], match: str = ".") -> None:
    with pytest.raises(HeadwiseError, match=match) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "\udcff"])
@pytest.mark.parametrize("read", [model_folder, find_model, lambda name: read_document(Path(name))])
def test_a_name_that_no_system_has_is_one_line(read: Callable[[str], object], name: str) -> None:
    refused(lambda: read(name))


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "\ud800"])
def test_a_place_to_write_that_no_system_has_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        check_writable(Path(name))


@pytest.mark.parametrize("model", [None, 5, b"x", ["x"]])
def test_a_model_that_is_no_name_is_refused(model: object) -> None:
    with pytest.raises(OptionError, match=r"expected a folder, a \.gguf file or a hub id"):
        load(model)  # type: ignore[arg-type]


def others(folder: Path) -> dict[str, Path]:
    """A pipe, a socket, a device and a folder, none of which is a file."""
    found = {name: folder / name for name in ("pipe", "socket", "folder")}
    os.mkfifo(found["pipe"])
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(found["socket"]))
    found["folder"].mkdir()
    return found | {"device": Path("/dev/zero")}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_what_is_no_file_is_refused_before_it_is_opened(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # a short folder: the name of a socket has little room
    path = others(tmp_path_factory.mktemp("o"))[kind]
    for read in (read_text, read_json, read_document, file_digest, read_corpus):
        refused(lambda read=read: read(path), "is not a file")  # type: ignore[misc]
    if kind != "folder":
        refused(lambda: model_folder(str(path)), "is not a file")
        refused(lambda: find_model(str(path)), "is not a file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_pipe_in_a_models_folder_is_refused(name: str, copy: Path) -> None:
    if "index" in name:
        (copy / "model.safetensors").unlink()
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    refused(lambda: load(copy), "is not a file")


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        '{"a":' * 100000,
        "[1]",
        "5",
        "null",
        '"x"',
        "",
        "\ufeff{",
        "9" * 5000,
        '{"a": NaN',
        b"\xff\xfe{\x00",
        b"\x00" * 64,
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_not_an_object_is_one_line(
    name: str, content: str | bytes, copy: Path
) -> None:
    if "index" in name:
        (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: model_folder(str(copy)), name)


@pytest.mark.parametrize(
    "shard",
    [
        5,
        None,
        ["x"],
        {},
        "",
        "x.bin",
        "/etc/x.safetensors",
        "../x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "x\x00.safetensors",
    ],
)
def test_an_index_names_weight_files_of_its_folder_alone(shard: object, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "x.safetensors")
    index = {"weight_map": {"a": shard}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load(copy))
    refused(lambda: StoredWeights(copy))


@pytest.mark.parametrize("index", [{}, {"weight_map": 5}, {"weight_map": ["x"]}])
def test_an_index_without_a_map_is_refused(index: object, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load(copy), "index")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [DEEP, "[1]", '{"model": 5}', "\x00", "{"])
def test_a_damaged_companion_is_one_line_or_not_needed(name: str, content: str, copy: Path) -> None:
    (copy / name).write_text(content)
    with contextlib.suppress(HeadwiseError):
        load(copy)


def put_header(file: Path, content: bytes, size: int = 64) -> None:
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))


GOOD = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
WRONG: list[object] = [None, True, -5, 5, 1.5, 2**63, 10**30, "", "F9", "I64", "x" * 99]
WRONG += [[], [1], [-1, 4], [4, 8], [0, 65], [64, 0], [1.5], ["0", "64"], {}, [[0], 64], [0, 4, 8]]


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_a_header_of_wrong_fields_is_one_line(field: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    bad = [GOOD | {field: value} for value in WRONG]
    bad.append({name: value for name, value in GOOD.items() if name != field})
    for tensor in bad:
        put_header(file, json.dumps({"x": tensor}).encode())
        refused(lambda: weight_bytes(tmp_path, torch.bfloat16), "not a readable safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"5",
        b"[]",
        b"{",
        b"\xff{}",
        DEEP.encode(),
        b'{"x":' * 20000,
        b'{"x": %s, "x": %s}' % (json.dumps(GOOD).encode(), json.dumps(GOOD).encode()),
        json.dumps({"x": GOOD, "y": GOOD}).encode(),
        b'{"__metadata__": {"a": 1}}',
    ],
)
def test_a_header_that_is_none_is_one_line(header: bytes, tmp_path: Path) -> None:
    put_header(tmp_path / "model.safetensors", header)
    refused(lambda: weight_bytes(tmp_path, None), "not a readable safetensors file")


def test_damaged_headers_are_counted_as_safetensors_reads_them_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.zeros(3, 5), "b.weight": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, file, metadata={"format": "pt"})
    good, draw = file.read_bytes(), random.Random(19)
    end = 8 + struct.unpack("<Q", good[:8])[0]
    counted = 0
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(end)
            what = draw.randrange(4)
            if what == 0:
                damaged[at] = draw.randrange(256)
            elif what == 1:
                damaged[at : at + draw.randrange(9)] = b""
            elif what == 2:
                damaged[at:at] = bytes(draw.choice(b'0123456789-.,:"[]{}eN') for _ in range(3))
            else:
                other = draw.randrange(end)
                damaged[at : at + 6] = good[other : other + 6]
        file.write_bytes(damaged)
        try:
            with safe_open(file, framework="pt") as stored:
                expected = sum(stored.get_tensor(name).nbytes for name in list(stored.keys()))
        except SafetensorError:
            refused(lambda: weight_bytes(tmp_path, None))
        else:
            counted += 1
            assert weight_bytes(tmp_path, None) == expected
    assert 0 < counted < 250  # a name may be damaged without harm


@pytest.mark.parametrize("value", ["~nobody-of-that-name/x", "x" * 5000])
def test_a_cache_variable_that_is_no_path_is_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", value)
    with pytest.raises(LoadError, match=r"HEADWISE_CACHE: .*cannot be a path"):
        cache_folder("gguf")


def test_an_empty_cache_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWISE_CACHE", raising=False)
    expected = cache_folder("gguf")
    monkeypatch.setenv("HEADWISE_CACHE", "")
    assert cache_folder("gguf") == expected


def test_kept_figures_that_nest_deeply_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.measure.figures_store._file", lambda threads: tmp_path / "kept")
    (tmp_path / "kept").write_text(DEEP)
    assert kept_figures(1, []) is None


@pytest.mark.parametrize("content", [DEEP, "[]", "\xff"])
def test_a_comparison_whose_settings_cannot_be_read_is_one_line(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "configuration.json").write_text(content, encoding="latin-1")
    refused(lambda: ComparisonFolder(tmp_path, Configuration()), "give a new folder")


def test_a_config_that_names_another_file_of_weights_is_refused(copy: Path) -> None:
    # Transformers would read that file, through an index outside of the folder or a pickle too
    config = copy / "config.json"
    fields = json.loads(config.read_text()) | {"transformers_weights": "x.safetensors.index.json"}
    config.write_text(json.dumps(fields))
    with pytest.raises(LoadError, match="names another file of weights"):
        load(copy)
