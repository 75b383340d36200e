"""`headwise plan` as typed: its tables, its JSON, its plot, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from headwise.base import units
from headwise.cli import main
from headwise.errors import OptionError

GIVEN = ["--bandwidth", "50GB/s", "--peak", "200GFLOP/s"]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> int:
    return main(["plan", *arguments])


def test_the_tables_answer_the_questions(wide: None, capsys: Any) -> None:
    assert run("llama-3-8b", "--context", "8k", "--batch", "4", "--memory", "24GiB", *GIVEN) == 0
    shown = capsys.readouterr().out
    for part in (
        "GQA 32/8 heads, D 128",
        "131,072 bytes",
        "4.00 GiB needed; Transformers holds 4.00 GiB, headwise 5.00 GiB with the room it grows by",
        "14.96 GiB: 8.03 billion parameters",
        "8,192 tokens (the model's limit) at batch 4; batch 9 at 8,192 tokens",
        "by bandwidth",
        "gqa:8 (as it is)",
        "50 GB/s, 200 GFLOP/s",
    ):
        assert part in shown, part


def test_an_encoder_decoder_and_its_two_lengths(wide: None, capsys: Any) -> None:
    assert run("t5-base", "--context", "100", "--encoder-context", "2k", *GIVEN) == 0
    shown = capsys.readouterr().out
    assert "100 tokens, 2,048 in the encoder" in shown and "12 decoder" in shown


def test_json_is_one_object(capsys: Any) -> None:
    assert run("gpt-oss-20b", "--context", "128k", "--cache-dtype", "int8", *GIVEN, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"] == {"dtype": "bfloat16", "bits": 8}
    assert found["context"] == 131072 and len(found["model"]["sources"]) > 0


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_plot_is_written(name: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / name
    assert run("qwen3-0.6b", *GIVEN, "--plot", str(file)) == 0
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert run("qwen3-0.6b", *GIVEN, "--plot", str(file)) == 0
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_plot_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: Any) -> None:
    assert run("qwen3-0.6b", *GIVEN, "--plot", str(tmp_path / "no" / "x.png")) == 2
    assert run("qwen3-0.6b", *GIVEN, "--plot", str(tmp_path / "x.pdf")) == 2
    assert "ends with .png or .svg" in capsys.readouterr().err
    assert run("bert-base", *GIVEN, "--plot", str(tmp_path / "x.png")) == 2
    assert "nothing to plot" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_name_is_harmless(tmp_path: Path, wide: None, capsys: Any) -> None:
    from xml.dom import minidom

    folder = tmp_path / "\x1b[31m[bold]$x^$"
    folder.mkdir()
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "\x1b]0;x\x07[red]"}}
    (folder / "config.json").write_text(json.dumps(config))
    figure = tmp_path / "x.svg"
    assert run(str(folder), *GIVEN, "--plot", str(figure)) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "[bold]" in shown.out and "[red]" in shown.out
    minidom.parse(str(figure))


def test_the_list_has_every_model_and_device(wide: None, capsys: Any) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    assert "palm-540b" in shown and "MQA" in shown and "rtx-4090" in shown


def test_this_machine_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from headwise.measure import Figures, Peak, figures_store, machine

    asked = []

    def measure(threads: int, dtypes: list[str], progress: Any) -> Figures:
        asked.append(list(dtypes))
        moment = machine.Moment(machine.now(), others=0.0, spread=1.0)
        peaks = {dtype: Peak(1e11, 4096, moment) for dtype in dtypes}
        return Figures(threads, 1e10, 2**30, peaks, moment)

    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(figures_store, "measure_machine", measure)
    assert run("gpt2") == 0
    assert run("gpt2") == 0
    shown = capsys.readouterr().out
    assert "this machine: 10 GB/s, 100 GFLOP/s (measured 20" in shown
    assert "(today) with " in shown and "sums over 1,024 MiB, products of 4,096 x 4,096" in shown
    assert asked == [["float32", "bfloat16"]]
    assert run("gpt2", "--dtype", "fp16") == 0
    assert asked[1:] == [["float32", "float16"]]
    assert run("gpt2") == 0
    assert len(asked) == 2
    for file in (tmp_path / "machine").iterdir():
        file.write_text("{")
    capsys.readouterr()
    assert run("gpt2") == 0
    assert len(asked) == 3
    assert "the kept figures are damaged, so not used" in capsys.readouterr().out


def test_verify_says_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, wide: None, capsys: Any
) -> None:
    monkeypatch.setattr("headwise.planning.decode_times._CONTEXTS", ())
    assert run("gpt-oss-20b", *GIVEN, "--verify") == 0
    shown = capsys.readouterr().out
    assert shown.count("equal") == 3 and "cache bytes of 2 layers at 144 tokens" in shown
    monkeypatch.setattr("headwise.planning.verification.cache_nbytes", lambda cache: 5)
    assert run("gpt-oss-20b", *GIVEN, "--verify") == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is given"),
        (["lama3-8b"], "did you mean llama-3-8b"),
        (["gpt2", "--context", "12x"], "--context is '12x'"),
        (["gpt2", "--context", "0"], "--context is '0'"),
        (["gpt2", "--memory", "24Gi B"], "--memory is '24Gi B'"),
        (["gpt2", "--bandwidth", "50"], "--bandwidth is '50'"),
        (["gpt2", "--peak", "9GB/s"], "--peak is '9GB/s'"),
        (["gpt2", "--batch", "0"], "batch is 0"),
        (["gpt2", "--device", "h10"], "did you mean h100"),
        (["bert-base", "--verify"], "nothing to verify"),
        (["gpt2", "--device", "h100", "--verify"], "leave --device h100 out"),
        (["gpt2", "--context", "9" * 5000], "--context is '999"),
        (["gpt2", "--memory", "9" * 400], "--memory is '999"),
    ],
)
def test_what_is_refused_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    given = [] if "--device" in arguments else GIVEN
    extra = [] if "--bandwidth" in arguments or "--peak" in arguments else given
    assert run(*arguments, *extra) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("headwise: error: ") and message in error
    assert len(error) < 1200


def test_units() -> None:
    assert units.size("m", "1.5GiB") == 3 * 2**29
    assert units.size("m", "2g") == 2**31 and units.size("m", "2GB") == 2 * 10**9
    assert units.tokens("c", "1M") == 2**20 and units.tokens("c", "0.5k") == 512
    assert units.bandwidth("b", "1.5 TB/s") == 1.5e12
    assert units.flops("p", "2PFLOPS") == 2e15
    for wrong in ("", "k", "-5", "1.0001k", "1e3"):
        with pytest.raises(OptionError):
            units.tokens("c", wrong)
