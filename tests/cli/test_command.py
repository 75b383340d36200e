"""The command as a whole: version, help, env, and what it never imports."""

import io
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from headwise.base.console import harmless, one_line
from headwise.cli import main


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"headwise {version('headwise')}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["generate", "-h"], ["bench"], ["bench", "ops", "-h"], ["env", "--help"]],
)
def test_help_is_shown(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "Usage: headwise" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert (
        capsys.readouterr().err == "headwise: error: No such command 'fly'; see headwise --help\n"
    )


def test_python_m_headwise_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headwise", "--version"], capture_output=True, check=True, text=True
    )
    assert done.stdout == f"headwise {version('headwise')}\n"


def test_env_is_json_with_the_facts_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["cpu"]["torch_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["cpu"]["logical"] == os.cpu_count()
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    reasons = {each["name"]: each for each in found["backends"]}
    assert reasons["reference"]["available"] is True
    assert all(each["available"] or each["reason"] for each in found["backends"])


def test_env_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for expected in (torch.__version__, "backend reference", "available", "threads"):
        assert expected in out


def test_without_transformers_env_works_and_generate_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from headwise.cli import main\n"
        "sys.exit(main())\n"
    )
    run = [sys.executable, str(tmp_path / "block.py")]
    shown = subprocess.run([*run, "env"], capture_output=True, check=False, text=True)
    assert shown.returncode == 0, shown.stderr
    done = subprocess.run(
        [*run, "generate", "--prompt", "x"], capture_output=True, check=False, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "headwise: error: this needs Transformers; run: pip install 'headwise[hf]'"
    )


def test_importing_headwise_leaves_what_it_does_not_need_alone() -> None:
    code = (
        "import sys, headwise; "
        "print(*{'typer', 'rich', 'transformers', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
        "from headwise.cli import main; sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_no_control_character_is_left() -> None:
    every = "".join(map(chr, range(0x2100)))
    left = {character for character in harmless(every) if not character.isprintable()}
    assert not left & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
    assert "\u202e" not in harmless(every)
    assert {"\n", "\t"} <= set(harmless(every))
    assert one_line("a\n \x1b]0;b\x07") == "a ␛]0;b␇"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_does_not_have_is_replaced(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in "oe"]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
    assert main(["plan", "--list"]) == 0
    assert main(["env"]) == 0
    print("\u4f60 \u00d7 \u2190 \udcff \x1b[31m")
    assert main(["fly\u4f60\udcff"]) == 2
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "torch" in out.lower()
    assert ("?" in out) and ("\u4f60" in out) == (encoding == "utf-8")
    assert ("\u4f60" if encoding == "utf-8" else "\\u4f60") in err


def test_a_table_in_ascii_has_no_broken_frame() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headwise", "env"],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert b"+--" in done.stdout
    assert b"?" not in done.stdout


def test_a_closed_or_a_full_output_is_no_traceback() -> None:
    run = f"{shlex.quote(sys.executable)} -m headwise env"
    closed = subprocess.run(f"{run} >&-", shell=True, stderr=subprocess.PIPE, check=False)
    assert (closed.returncode, closed.stderr) == (0, b"")
    if Path("/dev/full").exists():
        full = subprocess.run(f"{run} >/dev/full", shell=True, stderr=subprocess.PIPE, check=False)
        assert full.returncode == 2
        assert full.stderr.splitlines() == [b"headwise: error: No space left on device: make room"]
