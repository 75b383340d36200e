"""The installed Transformers has every name that headwise rests on; one that it lacks is named."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import headwise
from headwise.errors import UnsupportedError
from headwise.hf import stock_names
from headwise.hf.stock_names import ASKED, IMPORTED

# What a class only has once it is made, and how it is made.
_MADE: dict[str, tuple[Any, ...]] = {
    "transformers.PreTrainedConfig": (),
    "transformers.GenerationConfig": (),
    "transformers.DynamicCache": (),
    "transformers.cache_utils.DynamicSlidingWindowLayer": (7,),
}


@pytest.mark.parametrize("name", [name for names in IMPORTED.values() for name in names])
def test_what_is_imported_is_there(name: str) -> None:
    assert getattr(stock_names, name) is not None


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in ASKED.items() for name in names]
)
def test_what_is_asked_by_name_is_there(owner: str, name: str) -> None:
    module, _, last = owner.rpartition(".")
    asked: Any = import_module(owner) if last.islower() else getattr(import_module(module), last)
    if owner in _MADE:
        asked = asked(*_MADE[owner])
    assert hasattr(asked, name), f"{owner} has no {name}: {ASKED[owner][name]}"


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.masking_utils.sdpa_mask")
    with pytest.raises(
        UnsupportedError,
        match=r"^Transformers [\d.]+ has no transformers\.masking_utils\.sdpa_mask \(the boolean "
        r"mask, where our operators need one\): install a release that headwise is tested with$",
    ):
        stock_names.sdpa_mask  # noqa: B018


def test_names_that_may_move_are_imported_in_one_file() -> None:
    source = Path(headwise.__file__).parent
    found = [
        (file.relative_to(source).as_posix(), node.module)
        for file in source.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
    ]
    assert sorted(found) == [
        ("hf/stock_names.py", "transformers.modeling_outputs"),
        *[("loading/progress.py", "transformers.utils")] * 2,
    ]
