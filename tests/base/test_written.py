"""Reports as files: whole or not at all."""

import json
from pathlib import Path

import pytest

from headwise.base.written import check_writable, write_whole
from headwise.bench import Report
from headwise.errors import OptionError
from headwise.measure import Figures


def test_a_report_is_json_with_machine_versions_and_command(tmp_path: Path) -> None:
    report = Report("headwise bench ops --rounds 4")
    with report.recording(tmp_path / "out.json"):
        report.figures.append(Figures(2, 1e10, 2**30, {}))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"] == "headwise bench ops --rounds 4"
    assert found["environment"]["cpu"]["torch_threads"] >= 1
    assert {"headwise", "torch", "python"} <= set(found["environment"])
    assert found["when"].endswith("+00:00")


def test_a_file_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    with pytest.raises(OptionError, match="does not exist; make it first"):
        check_writable(tmp_path / "none" / "new.json")
    with pytest.raises(OptionError, match="cannot be written"):
        check_writable(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwise.base.written.os.fsync", full)
    with pytest.raises(OptionError, match="No space left"):
        write_whole(path, b"new")
    assert [at.name for at in tmp_path.iterdir()] == ["out.json"]
    assert path.read_bytes() == b"old"
