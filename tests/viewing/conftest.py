"""A browser for the tests of the page: the Chromium that is installed, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


class Opened:
    """A page in the browser, what it said on its console, and what it asked any network for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def go(self, path: Path, place: str = "") -> Any:
        self.path = path
        self.page.goto(path.as_uri() + place)
        return self.page


def _missing() -> str | None:
    if not any(shutil.which(name) for name in NAMES):
        return "needs Chromium: apt-get install -y chromium"
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "needs Playwright: pip install playwright"
    return None


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    reason = _missing()
    if reason is not None:
        # where they have to run, a skip would hide that they did not
        assert not os.environ.get("HEADWISE_REQUIRE_BROWSER"), reason
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    executable = next(found for name in NAMES if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """A fresh page; at the end it has said nothing and asked for nothing but itself."""
    context = browser.new_context(
        viewport={"width": 1400, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    found = Opened(context.new_page())
    yield found
    context.close()
    assert found.said == []
    own = found.path.as_uri()
    assert [url for url in found.asked if not url.startswith((own, "data:", "blob:"))] == []
