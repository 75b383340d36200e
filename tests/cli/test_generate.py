"""`headwise generate`: the text, the table, the JSON, and one line for each bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from cli.checkpoints import HEAD_DIM, KV_HEADS, LAYERS, VOCAB, save_tiny, save_tiny_gguf
from headwise.cli import main
from loading.gguf_files import SIZES, make_stock, write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code = main(["generate", *arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad call ends with; whatever progress came before it is no error."""
    code = main([*arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert sum(line.startswith("headwise: error: ") for line in lines) == 1
    return lines[-1]


def test_tokens_are_those_of_stock_transformers(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = run_json(capsys, str(tiny), "--prompt", "the same text", "--max-new-tokens", "19")
    stock = AutoModelForCausalLM.from_pretrained(tiny)
    ids = AutoTokenizer.from_pretrained(tiny)("the same text", return_tensors="pt").input_ids
    expected = stock.generate(ids, max_new_tokens=19, do_sample=False, pad_token_id=0)
    assert found["runs"][0]["tokens"] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("cache", "bytes_of_a_row"),
    [
        ("paged", 4 * HEAD_DIM),
        ("int8", HEAD_DIM + 4),
        ("int4", HEAD_DIM // 2 + 4),
        ("int4:8", HEAD_DIM // 2 + 4),
    ],
)
def test_the_cache_is_the_one_that_was_asked_for(
    tiny: Path, capsys: pytest.CaptureFixture[str], cache: str, bytes_of_a_row: int
) -> None:
    options = [str(tiny), "--prompt", "x" * 29, "--max-new-tokens", "7", "--cache", cache]
    found = run_json(capsys, *options, "--against", "sdpa")
    ours, stock = found["runs"]
    assert [each["cache"] for each in ours["layers"]] == ["paged:64" if cache == "paged" else cache]
    assert [each["cache"] for each in stock["layers"]] == ["Transformers"]
    assert ours["cache"]["bytes_per_token"] == LAYERS * 2 * KV_HEADS * bytes_of_a_row
    assert found["identical"] or cache != "paged"
    assert main(["generate", *options]) == 0
    assert ours["layers"][0]["cache"] in capsys.readouterr().out


@pytest.mark.parametrize(("one", "other"), [("headwise", "sdpa"), ("sdpa", "eager")])
def test_a_comparison_runs_both_and_says_whether_tokens_are_identical(
    tiny: Path, capsys: pytest.CaptureFixture[str], one: str, other: str
) -> None:
    options = ["--prompt", "x" * 29, "--max-new-tokens", "13"]
    found = run_json(capsys, str(tiny), *options, "--attention", one, "--against", other)
    assert [run["attention"] for run in found["runs"]] == [one, other]
    assert found["identical"] is True
    for run in found["runs"]:
        assert run["prefill"]["tokens"] == 29
        assert len(run["tokens"]) == run["decode"]["tokens"] == 13
        assert run["cache"]["tokens"] == 29 + 12
        # Keys and values of K heads in float32.
        assert run["cache"]["bytes_per_token"] == LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
        assert sum(layer["count"] for layer in run["layers"]) == LAYERS
        assert "GQA 6/2 heads" in run["layers"][0]["mechanism"]
    layers = [layer for run in found["runs"] for layer in run["layers"]]
    others = [other for layer in layers for other in layer["others"]]
    assert bool(others) == (one == "headwise")
    assert all(other["backend"] and other["reason"] for other in others)


def test_sparse_attention_is_compared_with_dense(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tiny), "--prompt", "x" * 90, "--max-new-tokens", "9", "--against", "dense"]
    asked = "topk:24,sinks=2,recent=8,dense=1"
    found = run_json(capsys, *options, "--sparse", asked)
    ours, dense = found["runs"]
    assert (ours["attention"], ours["sparse"]) == ("headwise", asked)
    assert (dense["attention"], dense["sparse"]) == ("dense", None)
    row = 2 * KV_HEADS * HEAD_DIM * 4
    held = 98
    assert dense["cache"]["bytes_read_per_step"] == LAYERS * held * row
    sketch = KV_HEADS * (HEAD_DIM // 2 + 4 * -(-HEAD_DIM // 32))
    read = held * row + (LAYERS - 1) * (held * sketch + 24 * row)
    assert ours["cache"]["bytes_read_per_step"] == read
    sums = KV_HEADS * HEAD_DIM * 4  # of no values yet
    more = ours["cache"]["bytes"] - dense["cache"]["bytes"]
    assert more == (LAYERS - 1) * (held * sketch + sums)
    assert found["kl"]["nats"] >= 0 and 1 <= found["kl"]["tokens"] <= 9
    same = run_json(capsys, *options, "--sparse", "topk:200")
    assert same["identical"] and same["kl"] == {"nats": 0.0, "tokens": 9}
    assert main(["generate", *options, "--sparse", asked]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "topk:24,sinks=2" in shown and "read per token" in shown and "KL " in shown


def test_a_prompt_of_several_chunks_gives_the_tokens_of_one(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(tiny), "--prompt", "chunks of a prompt, read in turn", "--max-new-tokens", "11"]
    whole = run_json(capsys, *options)
    monkeypatch.setattr("headwise.generation.chunks.CHUNK", 7)
    assert run_json(capsys, *options)["runs"][0]["tokens"] == whole["runs"][0]["tokens"]


def test_a_prompt_of_one_token_works(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, str(tiny), "--prompt", "a", "--max-new-tokens", "3")
    assert found["runs"][0]["prefill"]["tokens"] == 1
    assert len(found["runs"][0]["tokens"]) == 3
    assert found["runs"][0]["cache"]["tokens"] == 3


def test_the_table_shows_both_columns_after_the_text(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "hello", "--max-new-tokens", "5", "--against", "sdpa"]
    assert main(["generate", str(tiny), *options]) == 0
    out = capsys.readouterr().out
    for expected in (
        "headwise",
        "sdpa",
        "GQA 6/2 heads, D 10",
        "Tokens identical: yes, all 5; sdpa is",
    ):
        assert expected in out
    for row in ("decode backend", "not used", "prefill", "per token (median)", "cache in total"):
        assert row in out


def test_the_context_stands_in_front_of_the_prompt(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("d" * 101)
    options = ["--prompt", "p" * 7, "--max-new-tokens", "1"]
    found = run_json(capsys, str(tiny), *options, "--context", str(tmp_path / "long.txt"))
    assert found["prompt_tokens"] == 101 + len("\n\n") + 7


def test_chat_wraps_the_prompt_in_the_models_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, chat=True)
    found = run_json(capsys, str(tmp_path), "--prompt", "hi", "--chat", "--max-new-tokens", "1")
    assert found["prompt_tokens"] == len("<user>hi<assistant>")


def test_a_seed_repeats_a_sampled_answer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(tiny), "--prompt", "seeds", "--max-new-tokens", "17", "--temperature", "1.5"]
    first = run_json(capsys, *options, "--seed", "23", "--against", "sdpa")
    again = run_json(capsys, *options, "--seed", "23")
    other = run_json(capsys, *options, "--seed", "29")
    assert first["identical"] is True
    assert first["runs"][0]["tokens"] == again["runs"][0]["tokens"] != other["runs"][0]["tokens"]


def test_a_vanishing_top_p_is_greedy(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(tiny), "--prompt", "nucleus", "--max-new-tokens", "11"]
    greedy = run_json(capsys, *options)
    sampled = run_json(capsys, *options, "--temperature", "2", "--top-p", "1e-6")
    assert sampled["runs"][0]["tokens"] == greedy["runs"][0]["tokens"]


def test_dtype_and_device_are_what_was_asked(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "x", "--max-new-tokens", "1", "--dtype", "bfloat16", "--device", "cpu"]
    found = run_json(capsys, str(tiny), *options)
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")


def test_escape_sequences_from_the_model_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, zero_head=True)
    assert main(["generate", str(tmp_path), "--prompt", "x", "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("␛␛␛\n")


def test_json_keeps_the_models_text_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, zero_head=True)
    found = run_json(capsys, str(tmp_path), "--prompt", "x", "--max-new-tokens", "2")
    assert found["runs"][0]["text"] == "\x1b\x1b"


def test_a_gguf_file_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    save_tiny_gguf(tmp_path / "own.gguf")
    options = ["--prompt", "x", "--max-new-tokens", "2", "--against", "sdpa"]
    found = run_json(capsys, str(tmp_path / "own.gguf"), *options)
    assert found["model"] == "own"
    assert found["identical"] is True


def test_a_gguf_files_blocks_are_multiplied_where_headwise_runs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 96, "intermediate_size": 160})
    file = write_gguf(tmp_path / "m.gguf", make_stock(config), "llama", quantized="Q4_0")
    options = ["--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]
    packed, numbers = "weights packed in Q4_0", "float weights"
    for more, expected in [
        ([], packed),
        (["--weights", "float"], numbers),
        (["--against", "sdpa"], numbers),
        (["--attention", "sdpa"], numbers),
        (["--weights", "packed", "--against", "sdpa"], packed),
    ]:
        assert run_json(capsys, str(file), *options, *more)["weights"] == expected, more
    assert main(["generate", str(file), *options]) == 0
    assert packed in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--max-new-tokens", "-3"], "max-new-tokens is -3"),
        (["--max-new-tokens", "many"], "Invalid value for '--max-new-tokens'"),
        (["--temperature", "-0.5"], "temperature is -0.5"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top-p is 0"),
        (["--top-p", "1.01"], "top-p is 1.01"),
        (["--seed", "-1"], "seed is -1"),
        (["--dtype", "int3"], "'int3'"),
        (["--attention", "flash"], "'flash'"),
        (["--cache", "int3"], "cache is 'int3', expected one of contiguous"),
        (["--cache", "paged:7"], "pages hold a power of two"),
        (["--cache", "int8:7"], "pages hold a power of two"),
        (["--cache", "int8", "--attention", "sdpa"], "--cache int8 is for headwise"),
        (["--against", "headwise"], "choose another"),
        (["--against", "dense"], "--against dense is headwise without --sparse"),
        (["--sparse", "topk"], "sparse is 'topk', expected"),
        (["--sparse", "topk:99", "--attention", "sdpa"], "--sparse is for headwise"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--no-such-option"], "--no-such-option"),
        (["--context", "/no/such/file"], "document /no/such/file cannot be read"),
        (["--context", "/"], "document / is not a file"),
        (["--chat"], "no chat template"),
        (["--max-new-tokens", "300"], "prompt (1 tokens) and answer (300) make 301 tokens"),
    ],
)
def test_a_bad_option_is_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in error_line(capsys, "generate", str(tiny), "--prompt", "x", *arguments)


def test_a_context_that_is_not_text_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"ok \xff\xfe")
    options = ["--prompt", "x", "--context", str(tmp_path / "image")]
    assert "is not UTF-8 text (byte 3)" in error_line(capsys, "generate", str(tiny), *options)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="every file can be read")
def test_a_context_that_may_not_be_read_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").touch(mode=0)
    options = ["--prompt", "x", "--context", str(tmp_path / "secret")]
    assert "Permission denied" in error_line(capsys, "generate", str(tiny), *options)


def test_a_prompt_is_asked_for(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in error_line(capsys, "generate", str(tiny))
    assert "prompt is empty" in error_line(capsys, "generate", str(tiny), "--prompt", " ")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "only as a pickle",
        ),
    ],
)
def test_what_is_not_a_model_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, expected: str
) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    damage(copy)
    assert expected in error_line(capsys, "generate", str(copy), "--prompt", "x")


def test_a_file_that_is_not_gguf_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"\x1b[2J")
    line = error_line(capsys, "generate", str(tmp_path / "bad.gguf"), "--prompt", "x")
    assert "not a GGUF file" in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "is an encoder (bert) and writes no text; give a decoder"),
        ({"model_type": "t5"}, "is an encoder-decoder (t5); the command needs a decoder"),
        ({"vocab_size": 3}, "the model has 3: they are not of one model"),
    ],
)
def test_a_model_that_cannot_write_is_refused_before_it_is_loaded(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert message in error_line(capsys, "generate", str(folder), "--prompt", "hello")


def test_weights_that_are_not_numbers_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "logits are not numbers" in error_line(
        capsys, "generate", str(folder), "--prompt", "hello"
    )


def test_a_context_far_too_long_is_refused_without_tokenizing_it(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "long.txt").write_text("d" * 100_000)
    monkeypatch.setattr(
        "headwise.generation.session.prompt_tokens", lambda *_, **__: pytest.fail("tokenized")
    )
    line = error_line(
        capsys, "generate", str(tiny), "--prompt", "p", "--context", str(tmp_path / "long.txt")
    )
    assert "prompt (at least " in line
    assert "more than the model's 211" in line


def test_a_context_that_is_not_a_file_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "generate", str(tiny), "--prompt", "p", "--context", str(tmp_path))
    assert "is not a file; give a text file" in line


def test_an_unreachable_hub_id_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "generate", "nobody/nothing", "--prompt", "x")
    assert "the hub cannot be reached" in line


def test_a_cache_that_does_not_fit_is_told_before_loading(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.loading.weight_files import weight_bytes

    # Room for the weights, not for the cache of 1 + 200 tokens as well.
    room = weight_bytes(tiny, None) + 200 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    options = ["--prompt", "x", "--device", "cpu"]
    line = error_line(capsys, "generate", str(tiny), *options, "--max-new-tokens", "200")
    assert "with a cache of 201 tokens needs" in line
    assert main(["generate", str(tiny), *options, "--max-new-tokens", "100"]) == 0


def test_an_accelerator_that_runs_out_of_memory_is_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("headwise.generation.recorder._generate", exhausted)
    line = error_line(capsys, "generate", str(tiny), "--prompt", "x")
    assert "ran out of memory after 0 of 1 prompt tokens" in line


def test_an_attention_that_the_model_lacks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    save_tiny(tmp_path)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=42,
        intermediate_size=26,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    line = error_line(capsys, "generate", str(tmp_path), "--prompt", "x", "--attention", "sdpa")
    assert "Gemma2ForCausalLM has no sdpa attention in Transformers; use eager" in line


@pytest.mark.skipif(os.name == "nt", reason="SIGINT goes to a whole console there")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_generated(tmp_path: Path, as_json: bool) -> None:
    save_tiny(tmp_path, limit=10**6)
    options = ["--prompt", "x", "--max-new-tokens", "900000", "--against", "sdpa"]
    command = [sys.executable, "-u", "-m", "headwise", "generate", str(tmp_path), *options]
    with subprocess.Popen(
        [*command, *(["--json"] if as_json else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell that runs the tests in the background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        if as_json:
            for line in running.stderr:
                if b"generating" in line:
                    break
        else:
            running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        try:
            out, err = running.communicate(timeout=120)
        finally:
            running.kill()  # or leaving the block would wait for it
    assert running.returncode == 130
    assert b"Traceback" not in err
    if as_json:
        (run,) = json.loads(out)["runs"]
        assert run["interrupted"]
        assert len(run["tokens"]) == run["decode"]["tokens"] < 900000
    else:
        assert b"headwise (interrupted)" in out
        assert b"new tokens" in out
