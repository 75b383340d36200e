"""The README as a package's description: its links must hold away from the repository.

A provider of dynamic metadata for scikit-build-core. With HEADWISE_URL, the repository's address,
relative links become absolute; without it they become plain text, and pictures go.
"""

import os
import re
from pathlib import Path
from typing import Any

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)\n?")
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


def described(text: str, url: str | None) -> str:
    """The README's text with links for a reader who is elsewhere."""
    if not url:
        return _LINK.sub(r"\1", _PICTURE.sub("", text))
    url = url.rstrip("/").removesuffix(".git")
    text = _PICTURE.sub(rf"![\1]({url}/raw/main/\2)\n", text)
    return _LINK.sub(rf"[\1]({url}/blob/main/\2)", text)


def dynamic_metadata(field: str, settings: dict[str, Any], project: Any) -> dict[str, str]:
    """What scikit-build-core asks a provider for: the field `readme`."""
    if field != "readme" or settings:
        raise ValueError(f"asked for {field} with {settings}, expected readme without settings")
    text = Path("README.md").read_text(encoding="utf-8")
    return {
        "content-type": "text/markdown",
        "text": described(text, os.environ.get("HEADWISE_URL")),
    }
