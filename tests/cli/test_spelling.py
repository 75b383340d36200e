"""One option is spelled alike in every command, and whatever is wrong is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.checkpoints import save_tiny, save_tiny_gguf
from headwise.cli import main
from headwise.cli.app import command
from headwise.loading import source

GENERATE = ["generate", "--prompt", "the", "--max-new-tokens", "3"]
BENCH_MODEL = ["bench", "model", "--contexts", "7", "--rounds", "4", "--peers", "none"]
COMPARE = ["compare", "--steps", "2", "--width", "24", "--heads", "3", "--layers", "1"]
COMPARE += ["--pairs", "4", "--vocabulary", "16", "--batch", "40", "--contexts", "17"]
COMPARE += ["--rounds", "4", "--mechanisms", "mha,mqa"]


pytestmark = pytest.mark.usefixtures("small_machine")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def _json(capsys: pytest.CaptureFixture, *arguments: object) -> Any:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_every_command_that_shows_figures_has_json(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the thing that there was the other " * 300)
    assert _json(capsys, *GENERATE, "--json", tiny)["model"] == "tiny"
    assert _json(capsys, "plan", tiny, "--device", "h100", "--json")["context"] == 211
    assert _json(capsys, "env", "--json")["headwise"]
    timed = _json(capsys, *BENCH_MODEL, tiny, "--json")
    assert timed["results"][0]["model"] == "tiny"
    operators = ["bench", "ops", "--shapes", "decode:4/2:d16:64", "--peers", "none"]
    assert _json(capsys, *operators, "--rounds", "4", "--json")["results"]
    assert _json(capsys, "bench", "machine", "--dtype", "fp32", "--json")["figures"]
    view = ["view", tiny, "--text", "the thing", "--out", tmp_path / "v.html", "--json"]
    assert _json(capsys, *view)["layers"][0]["mechanism"] == "GQA"
    assert len(_json(capsys, *COMPARE, "--out", tmp_path / "c", "--json")["mechanisms"]) == 2
    convert = ["convert", tiny, "--to", "mqa", "--calibration", text, "--out", tmp_path / "mqa"]
    sizes = ["--tokens", "128", "--length", "32", "--no-verdict", "--json"]
    assert _json(capsys, *convert, *sizes)["target"] == "mqa"


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16"])
def test_every_command_takes_the_short_names_of_dtypes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str
) -> None:
    assert _json(capsys, *GENERATE, "--model", tiny, "--dtype", dtype, "--json")["dtype"] == (
        "bfloat16"
    )
    plan = _json(capsys, "plan", tiny, "--device", "h100", "--dtype", dtype, "--json")
    assert plan["dtype"] == "bfloat16"
    timed = _json(capsys, *BENCH_MODEL, "--model", tiny, "--dtype", dtype, "--json")
    assert timed["results"][0]["dtype"] == "bfloat16"
    assert main(["view", str(tiny), "--dtype", dtype, "--out", str(tmp_path / "v.json")]) == 0


def test_the_demo_models_have_the_same_names_everywhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(source.ALIASES, "smollm2", (lambda: str(tiny), "Demo"))
    monkeypatch.chdir(tmp_path)
    assert _json(capsys, *GENERATE, "smollm2", "--json")["model"] == "Demo"
    assert _json(capsys, *BENCH_MODEL, "smollm2", "--json")["results"][0]["model"] == "Demo"
    plan = _json(capsys, "plan", "--model", "smollm2", "--device", "h100", "--json")
    assert plan["model"]["name"] == "Demo"
    assert _json(capsys, "view", "smollm2", "--json")["model"] == "Demo"
    made = _json(capsys, "convert", "smollm2", "--to", "mla", "--out", "mla", "--json")
    assert made["model"] == "Demo"
    # a file or folder of that name goes first
    save_tiny_gguf(tmp_path / "smollm2")
    assert source.find_source("smollm2").kind == "gguf"


def test_a_document_is_a_document_and_was_a_context(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("the thing " * 5)
    for option in ("--document", "--context"):
        assert _json(capsys, *GENERATE, tiny, option, text, "--json")["prompt_tokens"] > 40
        found = _json(capsys, "view", tiny, option, text, "--out", tmp_path / "v.html", "--json")
        assert len(found["tokens"]) > 30
    for name in ("generate", "view"):
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--document" in shown
        assert "--context" not in shown.replace("--context-parallel", "")


def test_the_list_of_commands_shows_whole_sentences(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("60", "80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main([]) == 0
        shown = capsys.readouterr().out
        assert "..." not in shown.replace("[ARGS]...", "")
        for found in command().commands.values():
            sentence = (found.short_help or found.help).partition("\n")[0]
            assert sentence in " ".join(shown.split())


def test_a_shell_completes_commands_and_options() -> None:
    for words, expected in (("headwise ge", "generate"), ("headwise plan --enc", "--encoder-")):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "headwise"],
            env={**os.environ, **asked, "_HEADWISE_COMPLETE": "complete_bash"},
            capture_output=True,
            check=True,
            text=True,
        )
        assert expected in done.stdout


WRONG = [
    (["fly"], "No such command 'fly'; see headwise --help"),
    (["--fly"], "No such option: --fly; see headwise --help"),
    (["bench", "fly"], "No such command 'fly'; see headwise bench --help"),
    (["generate"], "Missing option '--prompt'; see headwise generate --help"),
    (["generate", "--prompt"], "see headwise generate --help"),
    (["generate", "a", "b", "--prompt", "x"], "(b); see headwise generate --help"),
    ([*GENERATE, "--dtype", "int3"], "dtype 'int3' is unknown; use auto, float32, bfloat16, flo"),
    ([*GENERATE, "--dtype", "fp8"], "dtype 'fp8' is unknown"),
    ([*GENERATE, "--device", "gpu"], "device 'gpu' is unknown: expected auto, cpu, cuda or cuda:1"),
    ([*GENERATE, "--device", "cpu:x"], "device 'cpu:x' is unknown"),
    ([*GENERATE, "--device", ""], "device '' is unknown"),
    ([*GENERATE, "--attention", "fast"], "'fast' is not one of 'headwise', 'sdpa', 'eager'; see"),
    ([*GENERATE, "--cache", "int5"], "cache"),
    ([*GENERATE, "--against", "headwise"], "--against headwise is what --attention is"),
    ([*GENERATE, "--temperature", "-1"], "temperature"),
    ([*GENERATE, "--top-p", "2"], "top-p is 2.0"),
    ([*GENERATE, "--max-new-tokens", "0"], "max-new-tokens is 0"),
    ([*GENERATE, "--seed", "x"], "'--seed'"),
    ([*GENERATE, "--model", "./none"], "'./none' does not exist; give a model folder"),
    ([*GENERATE, "one", "--model", "other"], "model is 'one' and --model 'other'"),
    ([*GENERATE, "--document", "a", "--context", "b"], "--document and --context are the same"),
    ([*GENERATE, "--document", "/none"], "document /none cannot be read"),
    (["plan"], "no model is given"),
    (["plan", "llama-3"], "did you mean"),
    (["plan", "gpt2", "--memory", "24"], "--memory is '24', expected a size, as 24GiB"),
    (["plan", "gpt2", "--memory", "24 apples"], "--memory is '24 apples'"),
    (["plan", "gpt2", "--bandwidth", "50"], "--bandwidth is '50', expected bytes"),
    (["plan", "gpt2", "--peak", "150"], "--peak is '150', expected operations"),
    (["plan", "gpt2", "--context", "8q"], "--context is '8q', expected a number of tokens"),
    (["plan", "gpt2", "--context", "-1"], "--context is '-1'"),
    (["plan", "gpt2", "--batch", "0", "--device", "h100"], "batch is 0"),
    (["plan", "gpt2", "--dtype", "int3", "--device", "h100"], "dtype is 'int3'"),
    (["plan", "gpt2", "--cache-dtype", "int3", "--device", "h100"], "int3"),
    (["plan", "gpt2", "--device", "gpu"], "gpu"),
    (["plan", "gpt2", "--verify", "--device", "h100"], "leave --device h100 out"),
    (["plan", "gpt2", "--plot", "x.pdf"], ".png or .svg"),
    (["bench", "ops", "--shapes", "cube"], "cube"),
    (["bench", "ops", "--peers", "nobody"], "nobody"),
    (["bench", "ops", "--rounds", "1"], "rounds"),
    (["bench", "ops", "--dtype", "auto"], "dtype 'auto' is not for bench"),
    (["bench", "model", "--contexts", "8q"], "--contexts is '8q'"),
    (["bench", "model", "--threads", "0"], "threads"),
    (["bench", "machine", "--out", "/none/x.json"], "the folder /none does not exist"),
    (["compare", "--mechanisms", "magic"], "magic"),
    (["compare", "--task", "text"], "--task text needs --document FILE"),
    (["convert", "gpt2", "--to", "mqa"], "Missing option '--out'; see headwise convert --help"),
    (["convert", "gpt2", "--to", "cheap", "--out", "x"], "cheap"),
    (["view", "--out", "view.pdf"], "view.pdf"),
    (["view", "--layers", "a"], "layers"),
    (["view", "--without", "5"], "'5'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda at: " ".join(at)[:60])
def test_a_wrong_command_line_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    # what was being done may have been said before
    line = captured.err.splitlines()[-1]
    assert captured.out == ""
    assert line.startswith("headwise: error: ")
    assert message in line
    assert len(line) < 400
    assert list(tmp_path.iterdir()) == []
