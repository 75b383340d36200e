"""`headwise generate --context-parallel`: processes of this machine, and how they end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli.checkpoints import HEAD_DIM, KV_HEADS, LAYERS, save_tiny
from headwise.cli import main


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "headwise", "generate", *arguments]


def test_two_processes_write_what_one_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_tiny(tmp_path))
    options = [folder, "--prompt", "x" * 150, "--max-new-tokens", "9", "--json"]
    options += ["--temperature", "0.7", "--seed", "3"]
    assert main(["generate", *options]) == 0
    one = json.loads(capsys.readouterr().out)["runs"][0]
    done = subprocess.run(
        _command(*options, "--context-parallel", "2"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)["runs"][0]
    assert two["tokens"] == one["tokens"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    row = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    assert two["cache"]["bytes"] <= one["cache"]["bytes"] / 2 + 64 * row
    assert two["cache"]["bytes"] % row == 0


def test_a_process_that_dies_ends_the_command_in_one_line(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path, limit=100_000, zero_head=True))
    options = ["--prompt", "x" * 9, "--max-new-tokens", "90000", "--context-parallel", "2"]
    with subprocess.Popen(
        _command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stdout.read(1)  # it generates
        ranks = [
            child
            for child in psutil.Process(command.pid).children()
            if "run_rank" in " ".join(child.cmdline())
        ]
        ranks[-1].kill()
        command.stdout.close()
        assert command.stderr is not None
        lines = command.stderr.read().splitlines()
        assert command.wait(timeout=60) == 2
    errors = [line for line in lines if line.startswith("headwise: error: ")]
    assert len(errors) == 1
    assert errors == lines[-1:]
    assert "one has ended, or stalls" in errors[0]
    gone = time.monotonic() + 10
    while any(map(psutil.Process.is_running, ranks)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not any(map(psutil.Process.is_running, ranks))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context-parallel", "0"], "expected 1 to 64 processes"),
        (["--context-parallel", "65"], "expected 1 to 64 processes"),
        (["--context-parallel", "2", "--attention", "sdpa"], "--attention is sdpa"),
        (["--context-parallel", "2", "--sparse", "topk:128"], "need whole contexts"),
        (["--context-parallel", "2", "--remember"], "need whole contexts"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "no-such-model", "--prompt", "x", "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]
