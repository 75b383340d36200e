"""`headwise bench`: tables, JSON, exit codes, and one line for each bad input."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from cli.checkpoints import save_tiny
from headwise.bench import operators as bench_ops
from headwise.bench import suites
from headwise.cli import main

TINY = "decode:6/2:d16:47"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, small_machine: None) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_machine_shows_and_writes_bandwidth_and_peaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "machine.json"
    assert main(["bench", "machine", "--dtypes", "bf16,fp32", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "read bandwidth" in shown
    assert "GEMM bfloat16" in shown
    found = json.loads(out.read_text())
    assert list(found["figures"][0]["peaks"]) == ["bfloat16", "float32"]
    assert found["command"].startswith("headwise bench machine --dtypes bf16,fp32 --threads ")


def test_ops_shows_a_table_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ops.json"
    plot = tmp_path / "ops.svg"
    options = ["--peers", "sdpa,matmul,torch", "--rounds", "4", "--out", str(out)]
    options += ["--plot", str(plot)]
    assert main(["bench", "ops", "--shapes", f"{TINY},mla:7:r32+8:41", *options]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for expected in ("GQA 6/2 heads, D 16, 47 tokens", "sdpa", "vs headwise", "GFLOP/s", "runs on"):
        assert expected in shown
    found = json.loads(out.read_text())
    assert [at["shape"] for at in found["results"]] == [TINY, "mla:7:r32+8:d128:41"]
    rows = found["results"][0]["timed"]
    assert [row["name"] for row in rows] == ["headwise", "sdpa", "matmul"]
    assert set(rows[1]) >= {"seconds", "low", "high", "ratio", "bytes_per_second", "roofline"}
    assert found["interrupted"] is False
    assert "sdpa" in plot.read_text()


def test_the_recorded_command_runs_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    options = ["--shapes", TINY, "--peers", "none", "--rounds", "5"]
    assert main(["bench", "ops", *options, "--out", str(first)]) == 0
    one = json.loads(first.read_text())
    assert main([*shlex.split(one["command"])[1:], "--out", str(second)]) == 0
    other = json.loads(second.read_text())
    assert one["command"] == other["command"]
    assert [at["shape"] for at in one["results"]] == [at["shape"] for at in other["results"]]


def test_list_names_shapes_parts_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--list"]) == 0
    shown = capsys.readouterr().out
    for expected in ("llama3-decode", "decode:32/8:d128:16k", "r512+64", "sdpa-packed"):
        assert expected in shown


def test_model_shows_a_column_a_candidate_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "model.json"
    options = ["--contexts", "7,29", "--dtypes", "fp32", "--rounds", "4", "--out", str(out)]
    assert main(["bench", "model", str(folder), *options]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for expected in ("ms per token at 29", "stock-static", "prefill, tokens/s", "peak memory"):
        assert expected in shown
    (result,) = json.loads(out.read_text())["results"]
    assert (result["model"], result["dtype"]) == ("tiny", "float32")
    assert [at["context"] for at in result["timed"][0]["contexts"]] == [7, 29]
    assert {"slope", "peak_memory", "cache_bytes"} <= set(result["timed"][0])


def _wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_ops.HEADWISE

    def build(given):
        bind = real.build(given)
        return lambda other: lambda: bind(other)() * 2

    monkeypatch.setattr(bench_ops, "HEADWISE", replace(real, build=build))


def test_a_wrong_result_of_headwise_is_told_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _wrong(monkeypatch)
    options = ["--peers", "matmul", "--rounds", "4"]
    assert main(["bench", "ops", "--shapes", TINY, *options]) == 1
    assert "headwise gave a WRONG result: error" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = suites.bench_shape, []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(suites, "bench_shape", stops)
    out = tmp_path / "ops.json"
    options = ["--peers", "none", "--rounds", "4", "--out", str(out)]
    assert main(["bench", "ops", "--shapes", f"{TINY},decode:4:d8:32", *options]) == 130
    assert capsys.readouterr().err.endswith("headwise: interrupted\n")
    found = json.loads(out.read_text())
    assert found["interrupted"] is True
    assert [at["shape"] for at in found["results"]] == [TINY]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ops", "--shapes", "nope"], "shape 'nope' is unknown; use one of llama3-decode"),
        (["ops", "--shapes", "decode:4:d8"], "has no context (16k)"),
        (["ops", "--shapes", TINY, "--dtypes", "int8"], "dtype 'int8' is unknown"),
        (["ops", "--shapes", TINY, "--peers", "fast"], "peer 'fast' is unknown"),
        (["ops", "--shapes", TINY, "--rounds", "3"], "rounds is 3, expected at least 4"),
        (["ops", "--shapes", TINY, "--threads", "0"], "threads is 0; expected 1 to"),
        (["ops", "--shapes", f"{TINY}:vs9999t"], "threads is 9999; expected 1 to"),
        (["ops", "--shapes", "decode:128:d128:999999k"], "of memory available"),
        (["ops", "--shapes", TINY, "--out", "/none/x.json"], "/none does not exist"),
        (["ops", "--shapes", TINY, "--plot", "x.pdf"], "ends with .png or .svg"),
        (["ops", "--shapes", TINY, "--plot", "/none/x.png"], "/none does not exist"),
        (["model", "--contexts", "8q"], "--contexts is '8q', expected a number of tokens"),
        (["model", "--peers", "fast"], "peer 'fast' is unknown"),
        (["model", "--out", "/none/x.json"], "/none does not exist"),
        (["machine", "--out", "/none/x.json"], "/none does not exist"),
        (["machine", "--dtypes", "float8"], "dtype 'float8' is unknown"),
    ],
)
def test_a_bad_option_is_one_line_before_any_work(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("headwise: error: ")
