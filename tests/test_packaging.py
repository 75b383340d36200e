"""What a wheel says of itself: links of its description that hold away from the repository."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def readme() -> Any:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "packaging" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "url", ["https://host.example/o/h", "https://host.example/o/h/", "https://host.example/o/h.git"]
)
def test_with_an_address_every_link_is_absolute(readme: Any, url: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", readme.described(text, url))
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", text)) > 10
    assert "https://host.example/o/h/blob/main/docs/design.md" in links
    assert "https://host.example/o/h/raw/main/docs/images/view.png" in links
    assert all(link.startswith("https://") for link in links)
    for link in links:  # and each is a file here
        assert (ROOT / link.partition("/main/")[2]).is_file(), link


def test_without_an_address_no_link_dangles(readme: Any) -> None:
    found = readme.described("![a](b.png)\nsee [c](d/e.md), [f](https://g.example)", None)
    assert found == "see c, [f](https://g.example)"


def test_only_the_readme_is_provided(readme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("HEADWISE_URL", raising=False)
    assert readme.dynamic_metadata("readme", {}, None)["text"].startswith("# headwise")
    with pytest.raises(ValueError, match="asked for version"):
        readme.dynamic_metadata("version", {}, None)
