"""Every block of Python and every command line of the README and the docs, as they stand."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.checkpoints import save_tiny, save_tiny_gguf
from headwise.cli import main
from headwise.cli.app import command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and page.name != "cli.md"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of headwise, without their comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [each for each in words if each[:1] == ["headwise"]]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_machine: None) -> Path:
    """A folder with what the pages speak of: a model, texts; the demo model is that one too."""
    model = save_tiny(tmp_path / "my-model", chat=True, limit=4096, hidden=96)
    for name in ("MODEL", "path/to/model"):
        shutil.copytree(model, tmp_path / name)
    save_tiny_gguf(tmp_path / "model.gguf")
    text = "the thing that there was the other " * 1000
    for name in ("text.txt", "book.txt", "report.txt"):
        (tmp_path / name).write_text(text[:900] if name == "report.txt" else text)
    monkeypatch.setattr("headwise.loading.source.DEMO_PACKAGE", "no_such_package")
    monkeypatch.setattr("headwise.loading.source.DEMO_HUB_ID", str(model))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What takes long of it, which make sweep runs.
SLOW = {("python", "bench.md"), ("bash", "plan.md")}


def _pages(language: str) -> list[Any]:
    with_some = [page for page in PAGES if blocks(page, language)]
    return [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=pytest.mark.sweep if (language, page.name) in SLOW else (),
        )
        for page in with_some
    ]


# What to write into headwise itself, which is compiled only.
EXCERPTS = ("backend.md",)


@pytest.mark.parametrize("page", _pages("python"))
def test_blocks_of_python_run_as_they_stand(page: Path, at_home: Path) -> None:
    names: dict[str, Any] = {"__name__": "a_page"}
    for block in blocks(page, "python"):
        if block.startswith(">>>"):
            continue  # a doctest, which runs as such
        # the one model that has to come from the hub
        block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(at_home / "my-model"))
        code = compile(block, str(page), "exec")
        if page.name not in EXCERPTS:
            exec(code, names)


@pytest.mark.parametrize("page", [at for at in _pages("bash") if commands(at.values[0])])
def test_command_lines_run_as_they_stand(
    page: Path, at_home: Path, capsys: pytest.CaptureFixture
) -> None:
    for _, name, *rest in commands(page):
        found = command().commands[name]
        if name in ("bench", "compare", "convert"):  # minutes each: their options are read
            if name == "bench":
                name, *rest = rest
                found = found.commands[name]
            found.make_context(name, list(rest))
        elif "0,31990-31999" not in rest:  # of a book
            assert main([name, *rest]) == 0, (name, rest, capsys.readouterr().err)
