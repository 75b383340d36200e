"""`headwise remember` and `forget`, and `generate --remember`: what is stored, listed and used."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.checkpoints import save_tiny
from headwise.cli import main

TEXT = "the wind was high and the sea was low. " * 12


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return save_tiny(tmp_path / "model", limit=2048)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def answer(capsys: pytest.CaptureFixture[str], tiny: Path, *arguments: Any) -> dict[str, Any]:
    text = tiny.parent / "text.txt"
    given = ("generate", tiny, "--document", text, "--prompt", "why?", "--max-new-tokens", 7)
    found: dict[str, Any] = json.loads(run(capsys, *given, *arguments, "--json"))
    return found["runs"][0]


def test_a_text_is_read_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = answer(capsys, tiny)
    assert expected["remembered"] == {"tokens": 0}
    text = tiny.parent / "text.txt"
    stored = json.loads(run(capsys, "remember", text, "--model", tiny, "--json"))
    assert (stored["known"], stored["stored"], stored["notes"]) == (0, stored["tokens"], [])
    found = answer(capsys, tiny, "--remember")
    assert found["tokens"] == expected["tokens"]
    # the tokens of the text, but for those where a prompt follows it
    assert stored["tokens"] - 3 <= found["remembered"]["tokens"] <= stored["tokens"]
    read = found["prefill"]["tokens"]
    assert found["remembered"]["tokens"] + read == expected["prefill"]["tokens"]
    assert found["cache"]["tokens"] == expected["cache"]["tokens"]
    again = answer(capsys, tiny, "--remember")
    assert again["tokens"] == expected["tokens"]
    assert again["prefill"]["tokens"] == 1


def test_the_table_says_what_was_remembered(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny.parent / "text.txt"
    out = run(capsys, "remember", text, "--model", tiny)
    assert "stored" in out
    given = ("generate", tiny, "--document", text, "--prompt", "why?", "--max-new-tokens", 3)
    assert "remembered" in run(capsys, *given, "--remember")
    assert "remembered" not in run(capsys, *given)


def test_what_is_stored_is_listed_and_forgotten(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny.parent / "text.txt"
    assert run(capsys, "remember").strip() == "nothing is remembered"
    for cache in ("contiguous", "int8"):
        run(capsys, "remember", text, "--model", tiny, "--cache", cache)
    listed = json.loads(run(capsys, "remember", "--json"))
    assert {each["cache"] for each in listed} == {"exact", "int8"}
    assert all(each["model"] == "LlamaForCausalLM" and each["tokens"] > 400 for each in listed)
    table = run(capsys, "remember")
    assert all(each["id"][:8] in table for each in listed)
    assert "removed 2 blocks" in run(capsys, "forget", listed[0]["id"][:8])
    assert [each["id"] for each in json.loads(run(capsys, "remember", "--json"))] == [
        listed[1]["id"]
    ]
    run(capsys, "forget", "--everything")
    assert json.loads(run(capsys, "remember", "--json")) == []


def test_another_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, folder = tiny.parent / "text.txt", tiny.parent / "here"
    run(capsys, "remember", text, "--model", tiny, "--folder", folder)
    assert len(json.loads(run(capsys, "remember", "--folder", folder, "--json"))) == 1
    assert json.loads(run(capsys, "remember", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("remember", "none.txt"), "none.txt cannot be read"),
        (("forget",), "give an id that headwise remember lists, or --everything"),
        (("forget", "abc"), "beginning of 0 ids"),
        (("forget", "abc", "--everything"), "give an id"),
        (("remember", "text.txt", "--limit", "much"), "expected a size"),
        (("generate", "--prompt", "x", "--remember", "--attention", "sdpa"), "is for headwise"),
    ],
)
def test_a_bad_call_is_one_line(
    arguments: tuple[str, ...],
    says: str,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("headwise: error: ")]
    assert len(lines) == 1
    assert says in lines[0]
