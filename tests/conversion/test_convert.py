"""`headwise.convert`: whole checkpoints, from folder to folder."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headwise
from cli.checkpoints import KV_HEADS, save_tiny
from headwise.conversion import Target, convert, pipeline
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.checkpoint import attentions
from headwise.conversion.checkpoint.weights import StoredWeights, write_weights
from headwise.conversion.coverage import check
from headwise.conversion.methods import layerwise
from headwise.conversion.tuning import distillation
from headwise.conversion.tuning.optimizer import ScaledAdam
from headwise.conversion.verdict import quality, speed
from headwise.conversion.verdict.verdict import Verdict
from headwise.errors import ConversionError, LoadError, OptionError

LENGTH = 40
TEXT = "".join(f"the {word} of the {other}. " for word in range(40) for other in "abcdefgh")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def sizes(text: Path) -> dict:
    return {"calibration": text, "tokens": 400, "length": LENGTH}


def _logits(folder: Path, **options: object) -> torch.Tensor:
    model, _ = headwise.load(folder, **options)
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


def _qwen2(folder: Path, **changes: object) -> Path:
    """A random Qwen2 with biases and the tiny tokenizer."""
    save_tiny(folder)
    torch.manual_seed(1)
    config = hf.Qwen2Config(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    model = hf.Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["aware", "naive"])
def test_mqa_is_an_ordinary_checkpoint_that_stock_loads(
    model: Path, sizes: dict, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    verdict = convert(model, "mqa", out=out, method=method, **sizes)
    stock, info = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(stock) is hf.LlamaForCausalLM
    assert stock.config.num_key_value_heads == 1
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert verdict.cache.converted * KV_HEADS == verdict.cache.original
    assert len(verdict.layer_errors) == stock.config.num_hidden_layers
    assert verdict.converted is not None
    assert 0 <= verdict.converted.agreement <= 1
    assert json.loads((out / "headwise-verdict.json").read_text())["target"] == "mqa"
    assert "AutoModelForCausalLM" in (out / "README.md").read_text(encoding="utf-8")
    tokenizers = [hf.AutoTokenizer.from_pretrained(folder) for folder in (model, out)]
    assert tokenizers[0]("then").input_ids == tokenizers[1]("then").input_ids
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(StoredWeights(model)[untouched], StoredWeights(out)[untouched])


def test_mla_with_everything_kept_is_the_original(model: Path, tmp_path: Path) -> None:
    verdict = convert(model, "mla", out=tmp_path / "out")
    assert verdict.cache.converted == verdict.cache.original
    assert verdict.converted is None  # no text to judge by
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(model), rtol=1e-4, atol=1e-4)
    greedy = []
    for folder in (model, tmp_path / "out"):
        loaded, _ = headwise.load(folder)
        headwise.attach(loaded)
        greedy.append(loaded.generate(torch.arange(9)[None], max_new_tokens=128, do_sample=False))
    assert torch.equal(*greedy)


@pytest.mark.parametrize("to", ["mla", "mla:100%"])
def test_biases_are_converted_too(tmp_path: Path, to: str) -> None:
    model = _qwen2(tmp_path / "qwen2")
    convert(model, to, out=tmp_path / "out")
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(model), rtol=1e-4, atol=1e-3)


def test_gqa_of_a_model_with_biases(tmp_path: Path, sizes: dict) -> None:
    model = _qwen2(tmp_path / "qwen2")
    convert(model, "gqa:2", out=tmp_path / "out", **sizes)
    stock, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(stock) is hf.Qwen2ForCausalLM
    assert stock.config.num_key_value_heads == 2
    assert not info["missing_keys"]


def test_a_share_of_the_cache_is_what_is_cached(model: Path, sizes: dict, tmp_path: Path) -> None:
    verdict = convert(model, "mla:60%", out=tmp_path / "out", **sizes)
    assert verdict.cache.converted / verdict.cache.original == pytest.approx(0.6)
    loaded, _ = headwise.load(tmp_path / "out")
    headwise.attach(loaded)
    out = loaded(torch.arange(20)[None], use_cache=True)
    cached = headwise.hf.cache_nbytes(out.past_key_values)
    assert cached == 20 * verdict.cache.converted


def test_reloads_to_the_bit_in_a_fresh_process(model: Path, sizes: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, "mla:rank=16,rope=12", out=out, **sizes)
    code = (
        "import sys, torch, headwise.hf, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(m(torch.arange(30)[None]).logits.detach(), sys.argv[2])"
    )
    for name in ("first", "second"):
        subprocess.run([sys.executable, "-c", code, out, tmp_path / name], check=True)
    first, second = (torch.load(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _logits(out), rtol=1e-4, atol=1e-4)


def test_the_dtype_of_the_checkpoint_stays(model: Path, sizes: dict, tmp_path: Path) -> None:
    loaded = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded.save_pretrained(model)
    convert(model, "mla:50%", out=tmp_path / "out", **sizes)
    weights = StoredWeights(tmp_path / "out")
    dtypes = {weights[name].dtype for name in weights}
    assert dtypes == {torch.bfloat16, torch.int64}
    assert _logits(tmp_path / "out").dtype == torch.bfloat16


def test_a_conversion_that_fails_leaves_nothing(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(layerwise, "copy_companions", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "mqa", out=tmp_path / "out", **sizes)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    convert(model, "mqa", out=tmp_path / "out", **sizes)
    assert (tmp_path / "out" / "README.md").is_file()


def test_tuning_brings_the_model_nearer_and_goes_on_after_an_interruption(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = convert(model, "mla:50%", out=tmp_path / "whole", tune=6, **sizes)
    assert verdict.tuned is not None
    assert verdict.converted is not None
    assert verdict.tuned.perplexity != verdict.converted.perplexity
    untouched, touched = (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    )
    before, after = StoredWeights(model), StoredWeights(tmp_path / "whole")
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[touched], after[touched])
    assert not (tmp_path / ".whole.work").exists()

    steps = iter(range(6))

    def stop(self: ScaledAdam) -> bool:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return made(self)

    made = ScaledAdam.step
    monkeypatch.setattr(ScaledAdam, "step", stop)
    monkeypatch.setattr(distillation, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "mla:50%", out=tmp_path / "out", tune=6, **sizes)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ScaledAdam, "step", made)
    with pytest.raises(OptionError, match=r"holds another conversion .*to mla:50%, now mqa"):
        convert(model, "mqa", out=tmp_path / "out", tune=6, **sizes)

    def never(*args: object, **options: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(pipeline, "write_converted", never)
    convert(model, "mla:50%", out=tmp_path / "out", tune=6, **sizes)
    again = StoredWeights(tmp_path / "out")
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize("tune", [0, 2])
def test_an_interrupted_verdict_leaves_the_checkpoint(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: int
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(quality, "Judge", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "mqa", out=out, tune=tune, **sizes)
    monkeypatch.undo()
    whole = convert(model, "mqa", out=tmp_path / "whole", tune=tune, **sizes)
    assert torch.equal(_logits(out), _logits(tmp_path / "whole"))
    assert [file.name for file in sorted(tmp_path.glob(".*"))] == []
    assert "quality was not measured" in (out / "README.md").read_text()
    assert Verdict.from_dict(json.loads((out / "headwise-verdict.json").read_text())).cache == (
        whole.cache
    )


def test_without_a_verdict_nothing_is_measured(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(quality, "Judge")
    monkeypatch.delattr(speed, "compare_speed")
    verdict = convert(model, "mqa", out=tmp_path / "out", verdict=False, **sizes)
    assert (verdict.original, verdict.converted, verdict.speeds.contexts) == (None, None, ())
    assert verdict.conclusion == "mqa keeps 50% of the cache; quality was not measured"
    assert verdict.layer_errors


def test_no_file_of_the_checkpoint_names_a_place_of_this_machine(
    model: Path, sizes: dict, tmp_path: Path
) -> None:
    convert(model, "mqa", out=tmp_path / "out", **sizes)
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("to", ["mqa", "mla"])
@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_checkpoint_without_a_language_model_head_is_refused(
    model: Path, sizes: dict, tmp_path: Path, kind: str, to: str
) -> None:
    whole = hf.AutoModelForCausalLM.from_pretrained(model)
    other = whole.model if kind == "LlamaModel" else getattr(hf, kind)(whole.config)
    other.save_pretrained(model)
    with pytest.raises(ConversionError, match=f"is a {kind} without a language-model head"):
        convert(model, to, out=tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_is_removed(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.part-999999999"
    left.mkdir()
    (left / "model.safetensors").touch()
    convert(model, "mla", out=tmp_path / "out")
    assert not left.exists()


def test_shards_are_what_transformers_reads(model: Path, tmp_path: Path) -> None:
    weights, folder = StoredWeights(model), tmp_path / "sharded"
    folder.mkdir()
    shutil.copyfile(model / "config.json", folder / "config.json")
    write_weights(folder, ((name, weights[name]) for name in weights), shard_bytes=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name])
    again = StoredWeights(folder)
    assert sorted(again) == sorted(weights)
    assert torch.equal(again["model.norm.weight"], weights["model.norm.weight"])
    # and a conversion reads shards as it reads one file
    convert(_with_tokenizer(model, folder), "mla", out=tmp_path / "out")
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(model), rtol=1e-4, atol=1e-4)


def _with_tokenizer(model: Path, folder: Path) -> Path:
    for file in model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize(
    ("config", "to", "said"),
    [
        (hf.Qwen3Config(), "mla:50%", "QK-norm"),
        (hf.Gemma3TextConfig(), "mqa", "QK-norm"),
        (hf.DeepseekV3Config(), "mla:50%", "MLA already"),
        (hf.GPT2Config(), "mqa", "'gpt2' is not covered: expected llama, mistral, qwen2"),
        (hf.MistralConfig(sliding_window=4096), "mla", "sliding window"),
        (hf.LlamaConfig(num_key_value_heads=8), "gqa:3", "expected one of mqa, gqa:2, gqa:4"),
        (hf.LlamaConfig(num_key_value_heads=1), "mqa", "none to merge"),
        (hf.LlamaConfig(num_key_value_heads=2), "mla:rank=64,rope=258", "a rope of at most 256"),
        (hf.BertConfig(), "mqa", "no decoder layers"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(
    config: hf.PreTrainedConfig, to: str, said: str
) -> None:
    with pytest.raises(ConversionError, match=said) as caught:
        check(config, Target.parse(to))
    assert "\n" not in str(caught.value)


def test_sliding_windows_stay_in_gqa() -> None:
    config = hf.MistralConfig(sliding_window=64)
    check(config, Target.parse("gqa:4"))
    assert {attention.window for attention in attentions(config)} == {64}


@pytest.mark.parametrize(
    "word", ["", "gqa", "gqa:0", "mla:0%", "mla:101%", "mla:rank=8", "mla:rank=8,rope=7", "mqa:2"]
)
def test_a_target_that_is_none(word: str) -> None:
    with pytest.raises(OptionError, match="expected"):
        Target.parse(word)


@pytest.mark.parametrize("word", ["mqa", "gqa:4", "mla", "mla:37.5%", "mla:rank=8,rope=6", "mha"])
def test_targets_read_what_they_write(word: str) -> None:
    assert str(Target.parse(word)) == word


def test_sequences_do_not_overlap(model: Path, text: Path) -> None:
    _, tokenizer = headwise.load(model)
    sequences = Calibration.read(text, tokenizer, 400, LENGTH)
    assert sequences.fitted.shape == (10, LENGTH)
    ids = tokenizer(TEXT).input_ids
    assert sequences.fitted.flatten().tolist() == ids[:400]
    assert sequences.probed.flatten().tolist() == ids[400:480]
    cut = len(ids) // LENGTH * LENGTH
    assert sequences.held_out.flatten().tolist() == ids[cut - sequences.held_out.numel() : cut]
    assert sequences.held_out.numel() <= cut - 480
    assert sequences.tuned.flatten().tolist() == ids[: cut - sequences.held_out.numel()]


def test_every_sequence_begins_as_the_tokenizer_begins(model: Path, text: Path) -> None:
    _, tokenizer = headwise.load(model)
    tokenizer.bos_token = "<end>"
    tokenizer._tokenizer.post_processor = None

    class Begins:
        bos_token_id = 257

        def __call__(self, words: str, *, add_special_tokens: bool = True, verbose: bool = True):
            tokenized = tokenizer(words, add_special_tokens=False)
            if add_special_tokens:
                tokenized["input_ids"] = [257, *tokenized["input_ids"]]
            return tokenized

    sequences = Calibration.read(text, Begins(), 400, LENGTH)
    for part in (sequences.fitted, sequences.probed, sequences.held_out):
        assert (part[:, 0] == 257).all()
        assert (part[:, 1:] != 257).all()


def test_texts_that_will_not_do(model: Path, tmp_path: Path) -> None:
    _, tokenizer = headwise.load(model)
    file = tmp_path / "short.txt"
    file.write_text("too short", encoding="utf-8")
    with pytest.raises(OptionError, match="holds 9 tokens, and calibration needs at least 160"):
        Calibration.read(file, tokenizer, 400, LENGTH)
    with pytest.raises(LoadError, match=r"none\.txt cannot be read"):
        Calibration.read(tmp_path / "none.txt", tokenizer, 400, LENGTH)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LoadError, match=r"is not UTF-8 text"):
        Calibration.read(file, tokenizer, 400, LENGTH)


def test_streams_one_layer_at_a_time(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is asked for before its layer's turn, and none of a layer that is done is alive."""
    asked: list[str] = []
    read = StoredWeights.__getitem__

    def noted(self: StoredWeights, name: str) -> torch.Tensor:
        if self.folder == model:
            asked.append(name)
        return read(self, name)

    monkeypatch.setattr(StoredWeights, "__getitem__", noted)
    convert(model, "mqa", out=tmp_path / "out", **sizes)
    layers = [int(name.split(".")[2]) for name in asked if name.startswith("model.layers")]
    assert layers == sorted(layers)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(StoredWeights(model))


def _damaged(model: Path, change: Callable[[dict], None]) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_only_the_files_that_transformers_reads_are_converted(
    model: Path, sizes: dict, tmp_path: Path
) -> None:
    tensors = {
        name: torch.randn_like(tensor)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model_old.safetensors")
    convert(model, "mla", out=tmp_path / "out")
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(model), rtol=1e-4, atol=1e-4)


def test_rotary_tables_of_old_checkpoints_are_left_out(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _damaged(model, lambda tensors: tensors.update({name: torch.ones(5)}))
    convert(model, "mla", out=tmp_path / "out")
    assert name not in StoredWeights(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
            LoadError,
            "layer 2: mlp.up_proj.weight is missing",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 4)}),
            LoadError,
            r"layer 1: mlp.up_proj.weight is \[3, 4\], and the model's config.json asks for",
        ),
        (
            lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].fill_(torch.nan),
            ConversionError,
            "layer 1: hidden states are not finite",
        ),
    ],
)
def test_damaged_weights_are_said_in_one_line(
    model: Path, sizes: dict, tmp_path: Path, change: Callable, error: type, said: str
) -> None:
    _damaged(model, change)
    with pytest.raises(error, match=said):
        convert(model, "mqa", out=tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["mqa", "mla:50%"])
def test_silent_layers_and_tokens_without_an_embedding_convert(
    model: Path, sizes: dict, tmp_path: Path, to: str
) -> None:
    def silence(tensors: dict) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
        tensors["model.layers.2.self_attn.q_proj.weight"].zero_()
        tensors["model.embed_tokens.weight"][:120].zero_()

    _damaged(model, silence)
    verdict = convert(model, to, out=tmp_path / "out", **sizes)
    assert all(math.isfinite(error) for error in verdict.layer_errors)
    assert verdict.converted is not None
    assert math.isfinite(verdict.converted.perplexity)


def test_sequences_longer_than_the_positions_are_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"length is 300, and the model's positions .* reach 211"):
        convert(model, "mqa", out=tmp_path / "out", calibration=text, tokens=300, length=300)


def test_what_equals_the_original_is_not_tuned(model: Path, sizes: dict, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="mla equals the original: there is nothing to tune"):
        convert(model, "mla", out=tmp_path / "out", tune=3, **sizes)


@pytest.mark.parametrize("to", ["mla:99.9%", "mla:0.1%"])
def test_shares_that_leave_everything_or_nothing_are_refused(
    model: Path, sizes: dict, tmp_path: Path, to: str
) -> None:
    with pytest.raises(ConversionError, match="between 4 and 38 of the 40 elements"):
        convert(model, to, out=tmp_path / "out", **sizes)


def test_an_empty_folder_behind_a_link_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(model, "mla", out=tmp_path / "link")
    assert (tmp_path / "real" / "README.md").is_file()


def test_a_result_is_not_lost_to_its_timing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(speed, "compare_speed", fail)
    (model / "tokenizer_extra").mkdir()  # a folder among the files that are copied
    verdict = convert(model, "mla", out=tmp_path / "out")
    assert verdict.speeds.note == "decode speed was not measured: no room"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_disk_that_fails_is_said_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwise.conversion.checkpoint.weights.save_file", full)
    with pytest.raises(LoadError, match=r"cannot be written: .*No space left"):
        convert(model, "mla", out=tmp_path / "out")


def test_a_model_that_changed_is_not_gone_on_with(
    model: Path, sizes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "distil", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "mqa", out=tmp_path / "out", tune=2, **sizes)
    _damaged(model, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"].neg_())
    with pytest.raises(OptionError, match="holds another conversion"):
        convert(model, "mqa", out=tmp_path / "out", tune=2, **sizes)
    # without tuning nothing is gone on with, and what was left is removed
    convert(model, "mqa", out=tmp_path / "out", **sizes)
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_are_kept(
    model: Path, sizes: dict, tmp_path: Path, rope: dict
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1000.0, **rope}
    config["max_position_embeddings"] = 256
    (model / "config.json").write_text(json.dumps(config))
    wanted = _logits(model)
    convert(model, "mla", out=tmp_path / "exact")
    torch.testing.assert_close(_logits(tmp_path / "exact"), wanted, rtol=1e-4, atol=1e-4)
    convert(model, "mla:rank=40,rope=20", out=tmp_path / "all", **sizes)
    torch.testing.assert_close(_logits(tmp_path / "all"), wanted, rtol=1e-2, atol=1e-2)
