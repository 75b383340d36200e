"""`headwise convert`: what it asks the library for, what it prints, and one line for mistakes."""

from pathlib import Path

import pytest

from conversion.verdicts import verdict
from headwise import conversion
from headwise.cli import main
from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.speed import Speeds
from headwise.errors import OptionError
from headwise.loading.source import demo_model

CONVERT = ["convert", "tiny", "--to", "mqa", "--calibration", "my text.txt", "--out", "small"]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the library was asked for; it answers with `asked["answer"]`."""
    asked: dict = {}

    def convert(model: str, to: str, **options: object):
        answer = asked.pop("answer", verdict())
        asked.update(options, model=model, to=to)
        return answer

    monkeypatch.setattr(conversion, "convert", convert, raising=False)
    return asked


def test_options_reach_the_library(asked: dict) -> None:
    options = ["--method", "naive", "--tokens", "64", "--length", "32", "--tune", "7"]
    assert main([*CONVERT, *options]) == 0
    del asked["progress"]
    assert asked == {
        "model": "tiny",
        "to": "mqa",
        "calibration": Path("my text.txt"),
        "out": Path("small"),
        "method": "naive",
        "tokens": 64,
        "length": 32,
        "tune": 7,
        "verdict": True,
        "command": "headwise convert tiny --to mqa --calibration 'my text.txt' --out small "
        "--method naive --tokens 64 --length 32 --tune 7",
    }


def test_the_model_is_the_demo_or_named_by_an_option(asked: dict) -> None:
    assert main(["convert", "--to", "mla", "--out", "small"]) == 0
    assert (asked["model"], asked["calibration"]) == (demo_model(), None)
    assert asked["command"].startswith("headwise convert --to mla --out small")
    assert main(["convert", "--model", "tiny", "--to", "mla", "--out", "small"]) == 0
    assert asked["model"] == "tiny"


def test_the_verdict_fits_80_columns_and_ends_with_its_conclusion(
    asked: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    asked["answer"] = answer = verdict(3.4, tuned=Quality(17.6, 0.9, " there was a queen."))
    assert main(CONVERT) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == answer.conclusion
    shown = " ".join(" ".join(lines).split())
    for expected in (
        "SmolLM2-135M to mqa",
        "cache bytes per token 23,040 7,680 7,680",
        "perplexity 16.00 54.40 17.60",
        "8,192 tokens 42.1 ms 23.4 ms 1.80 (1.70-1.90)",
        "0.097 of theirs in the mean of 3 layers, at most 0.23 in layer 1",
        "continued: Once upon a time",
        "original: there was a king.",
        "tuned: there was a queen.",
        "method aware, 123 s, headwise 0.1.0, torch 2.99, transformers 5.24",
        "in small: the checkpoint; README.md has this verdict",
    ):
        assert expected in shown, expected


def test_what_was_not_measured_is_said(asked: dict, capsys: pytest.CaptureFixture[str]) -> None:
    asked["answer"] = verdict(
        target="mla",
        original=None,
        converted=None,
        positions=0,
        layer_errors=(),
        speeds=Speeds(note="decode speed was not measured: too big"),
    )
    assert main(CONVERT) == 0
    out = capsys.readouterr().out
    assert "decode speed was not measured: too big" in out
    assert "perplexity" not in out
    assert "quality was not measured" in out.splitlines()[-1]


def test_text_of_a_model_cannot_control_the_terminal(
    asked: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = "\x1b[2J [red]markup[/red]\u202e"
    asked["answer"] = verdict(model=foreign, prompt=foreign, converted=Quality(20.0, 0.5, foreign))
    assert main(CONVERT) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(out)
    assert out.count("[red]markup[/red]") == 3


def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*arguments: object, **options: object) -> None:
        raise OptionError("out is small, which is not empty; give a new folder")

    monkeypatch.setattr(conversion, "convert", convert, raising=False)
    for arguments, message in (
        (CONVERT, "out is small, which is not empty"),
        ([*CONVERT, "--model", "other"], "model is 'tiny' and --model 'other'"),
        (["convert", "tiny", "--out", "small"], "Missing option '--to'"),
        (["convert", "tiny", "--to", "mqa"], "Missing option '--out'"),
        ([*CONVERT, "--method", "best"], "'best' is not one of 'aware', 'naive'"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == ""
        assert line.startswith("headwise: error: ")
        assert message in line


def test_the_verdict_can_be_left_out(asked: dict) -> None:
    assert main([*CONVERT, "--no-verdict"]) == 0
    assert asked["verdict"] is False
    assert asked["command"].endswith("--tune 0 --no-verdict")


def test_the_card_gets_no_place_of_this_machine(asked: dict, tmp_path: Path) -> None:
    model, text = tmp_path / "tiny", tmp_path / "my text.txt"
    model.mkdir()
    options = ["--calibration", str(text), "--out", str(tmp_path / "small")]
    assert main(["convert", str(model), "--to", "mqa", *options]) == 0
    assert asked["command"].startswith(
        "headwise convert tiny --to mqa --calibration 'my text.txt' --out small"
    )


def test_an_interrupted_verdict_says_that_the_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "small"

    def interrupted(*args: object, **options: object) -> None:
        out.mkdir()
        (out / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    assert main([*CONVERT, "--out", str(out)]) == 130
    said = f"the checkpoint in {out} is whole, its verdict was not measured"
    assert capsys.readouterr().err == f"headwise: interrupted; {said}\n"


@pytest.mark.parametrize(("tune", "said"), [("0", "restarts"), ("5", "resumes from what is kept")])
def test_an_interruption_says_what_the_same_command_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tune: str, said: str
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    assert main([*CONVERT, "--tune", tune]) == 130
    assert capsys.readouterr().err == f"headwise: interrupted; the same command {said}\n"
