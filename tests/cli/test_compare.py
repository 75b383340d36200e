"""`headwise compare`: the table, the verdict, its folder, and one line for each bad input."""

import json
import re
from pathlib import Path

import pytest

from headwise import comparison
from headwise.cli import main
from headwise.comparison import experiment

TINY = ["--steps", "3", "--width", "24", "--heads", "3", "--pairs", "5", "--vocabulary", "22"]
TINY += ["--batch", "40", "--contexts", "17,31", "--rounds", "4", "--mechanisms", "mha,gqa:1"]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_compare_shows_every_figure_and_says_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", *TINY, "--seeds", "2", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    lines = " ".join(captured.out.split())
    for expected in (
        "recall of 5 pairs, 2 layers of 3 x 8 dims, 4 of 4 runs",
        "cache bytes per token 384 128",
        "at 20 tokens, in all 7,680 2,560",
        "decode at 31",
        "training tokens/s",
        "peak memory, MiB",
        "accuracy by any value of the sequence: 0.200",
        "results.json, results.csv, figure.svg",
    ):
        assert expected in lines
    assert re.search(r"accuracy (0\.\d{3} ){2}deviation of seeds (0\.\d{3} ){2}lowest", lines)
    assert captured.err.splitlines()[0] == "training 1 of 4: mha, seed 0"
    assert json.loads((out / "results.json").read_text())["complete"] is True


def test_an_interrupted_command_shows_what_it_has_and_goes_on_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = experiment.train, []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(experiment, "train", stops)
    command = ["compare", *TINY, "--out", str(tmp_path / "out")]
    assert main(command) == 130
    captured = capsys.readouterr()
    assert "1 of 2 runs" in captured.out
    assert captured.err.endswith("headwise: interrupted; the same command resumes from here\n")
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "2 of 2 runs" in captured.out
    assert "one seed cannot tell a difference from chance" in " ".join(captured.out.split())
    assert captured.err.splitlines()[0] == "training 1 of 1: gqa:1, seed 0"


def test_a_text_is_judged_by_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_bytes(b"some text " * 40)
    options = ["--task", "text", "--text", str(text), "--length", "7"]
    assert main(["compare", *TINY, *options, "--out", str(out)]) == 0
    assert "loss by the frequency of each byte" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["metric"] == "loss"


def test_the_defaults_are_those_of_the_library() -> None:
    import inspect

    from headwise.cli.compare import compare

    configuration = comparison.Configuration()
    for name, parameter in inspect.signature(compare).parameters.items():
        if name == "document":
            continue  # what the library has as a text
        if name in ("mechanisms", "contexts"):
            library = getattr(configuration, name, experiment.CONTEXTS)
            assert parameter.default == ",".join(map(str, library))
        elif name == "pairs":
            assert parameter.default is None  # 32 of recall, 8 of beyond
        elif name not in ("out", "rounds", "as_json"):
            assert parameter.default == getattr(configuration, name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mechanisms", "mha,gqq:2"], "mechanism 'gqq:2' is unknown; did you mean gqa:2?"),
        (["--mechanisms", "gqa:2"], "gqa:2 has 2 kv heads, which do not divide 3 heads"),
        (["--mechanisms", ","], "mechanisms is empty"),
        (["--mechanisms", "hybrid:3-1"], "hybrid:3-1 repeats 4 layers, and layers is 2"),
        (["--mechanisms", "mla:4", "--equal", "bytes"], "mla:4 at equal bytes: expected mla"),
        (["--seeds", "0"], "seeds is 0, expected an integer of at least 1"),
        (["--width", "25"], "width is 25, and 3 heads need a multiple of 12"),
        (["--task", "text"], "--task text needs --document FILE"),
        (["--text", "x.txt"], "--document FILE needs --task text"),
        (["--task", "text", "--document", "none.txt"], "none.txt cannot be read: No such file"),
        (["--task", "text", "--text", __file__, "--length", "99999"], "expected at least"),
        (["--contexts", "8q"], "--contexts is '8q', expected a number of tokens"),
        (["--contexts", ","], "--contexts is ',', expected numbers of tokens"),
        (["--rounds", "3"], "rounds is 3, expected at least 4"),
        (["--threads", "0"], "threads is 0, expected"),
        (["--out", "/proc/none"], "/proc/none: No such file or directory"),
        (["--out", __file__], "File exists; give another folder"),
        (["--out", str(Path(__file__).parent)], "is not empty and holds no comparison"),
    ],
)
def test_a_bad_option_is_one_line_before_any_work(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *TINY, "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("headwise: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
