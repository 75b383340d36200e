"""What a session shows: the names that TAB offers, short reprs, and tables when printed."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwise
from cli.checkpoints import save_tiny
from families import make
from headwise.cli import main

API = Path(__file__).parents[1] / "docs" / "api.md"


def test_dir_lists_what_the_api_page_lists() -> None:
    documented = re.findall(r":: headwise\.(\w+)(\.\w+)?$", API.read_text(), re.MULTILINE)
    assert {first for first, _ in documented} <= set(dir(headwise))
    for first, second in documented:
        found = getattr(headwise, first)
        if second:
            assert hasattr(found, second[1:]), (first, second)
    assert {"Any", "TYPE_CHECKING", "find_spec", "import_module"}.isdisjoint(dir(headwise))
    assert set(headwise.__all__) <= set(dir(headwise))


def test_no_public_name_is_lost() -> None:
    """Those of headwise, headwise.nn, headwise.hf and the API page, since they were first listed.

    A renamed one keeps its old name, and stays in the file.
    """
    for name in (Path(__file__).parent / "public_names.txt").read_text().split():
        value = headwise
        for part in name.split(".")[1:]:
            value = getattr(value, part, None)
        assert value is not None, name


def test_help_names_the_functions() -> None:
    code = "import pydoc, headwise; print(pydoc.render_doc(headwise, renderer=pydoc.plaintext))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    for name in ("attach", "load", "plan", "convert", "compare", "view", "attention"):
        assert f"\n    {name}(" in shown.stdout, name


def test_without_transformers_dir_lists_what_works() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import headwise; print(*dir(headwise)); [getattr(headwise, n) for n in dir(headwise)]"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    names = shown.stdout.split()
    assert {"attention", "compare", "nn", "ModelSpec"} <= set(names)
    assert {"attach", "plan", "hf"}.isdisjoint(names)


def test_reprs_are_one_short_line() -> None:
    model = make("llama-gqa")
    report = headwise.attach(model)
    plan = headwise.plan("llama-3-8b", context=8192, device="h100")
    for shown in (report, report.layers[0], plan, plan.model.spec):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)


def test_printing_a_plan_gives_the_commands_tables(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "llama-3-8b", "--context", "8k", "--device", "h100"]) == 0
    expected = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    print(headwise.plan("llama-3-8b", context=8192, device="h100"))
    assert capsys.readouterr().out.splitlines() == expected


def test_notebooks_get_html_in_which_nothing_foreign_is_markup(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "<b>x[bold]")
    plan = headwise.plan(folder, context=64, device="h100")
    report = headwise.attach(make("llama-gqa"))
    for shown in (plan, report):
        page = shown._repr_html_()
        assert re.findall(r"<(/?\w+)", page) == ["pre", "/pre"]
        assert max(map(len, html.unescape(page).splitlines())) < 200
    assert "&lt;b&gt;x[bold]" in plan._repr_html_()
    assert "<b>x[bold]" in str(plan)
