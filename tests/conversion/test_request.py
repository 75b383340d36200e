"""What a conversion refuses before any work."""

import os
from pathlib import Path

import pytest

from headwise.conversion.request import ConversionRequest
from headwise.conversion.target import Target
from headwise.errors import OptionError


def check(to: str, out: Path, **changes: object) -> None:
    options = {
        "calibration": Path("text"),
        "method": "aware",
        "tokens": 64,
        "length": 32,
        "tune": 0,
    }
    ConversionRequest(target=Target.parse(to), out=out, **options | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "calibration is missing: gqa:2 drops"),
        ({"method": "best"}, "method is 'best', expected aware or naive"),
        ({"length": 1}, "length is 1, expected at least 2"),
        ({"tokens": 31}, "tokens is 31, expected at least one sequence of 32"),
        ({"tune": -1}, "tune is -1, expected a number of steps"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check("gqa:2", tmp_path / "out", **changes)


@pytest.mark.parametrize("to", ["mla", "mha"])
def test_what_keeps_everything_needs_no_text_unless_it_is_tuned(tmp_path: Path, to: str) -> None:
    check(to, tmp_path / "out", calibration=None)
    with pytest.raises(OptionError, match="tune needs a text"):
        check(to, tmp_path / "out", calibration=None, tune=5)


def test_what_equals_the_original_is_not_tuned(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="mha equals the original: there is nothing to tune"):
        check("mha", tmp_path / "out", tune=5)


def test_the_folder_is_new_or_empty(tmp_path: Path) -> None:
    check("mqa", tmp_path / "above" / "new")
    check("mqa", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="is not empty; give a new folder"):
        check("mqa", tmp_path)
    with pytest.raises(OptionError, match="which is a file"):
        check("mqa", tmp_path / "file")
    with pytest.raises(OptionError, match="file cannot be written"):
        check("mqa", tmp_path / "file" / "out")


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OptionError, match="cannot be written; give a folder of yours"):
        check("mqa", tmp_path / "out")
