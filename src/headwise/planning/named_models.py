"""Models known by name: config facts, each with where it was read. One JSON file a model."""

import difflib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_SUFFIX = ".json"


@dataclass(frozen=True)
class NamedModel:
    """A model's config as its config.json would have it, and where each fact was read."""

    name: str
    title: str
    sources: tuple[str, ...]
    config: dict[str, Any]


def named_models() -> tuple[str, ...]:
    """The names, in order.

    >>> "llama-3-8b" in named_models()
    True
    """
    folder = files("headwise.planning").joinpath("named").iterdir()
    names = (file.name for file in folder if file.name.endswith(_SUFFIX))
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names))


def named_model(name: str) -> NamedModel:
    """The model of that name, one of `named_models`.

    >>> named_model("palm-540b").config["num_attention_heads"]
    48

    Raises:
        KeyError: there is none.
    """
    if name not in named_models():
        raise KeyError(name)
    file = files("headwise.planning").joinpath("named", name + _SUFFIX)
    facts = json.loads(file.read_text(encoding="utf-8"))
    return NamedModel(name, facts["title"], tuple(facts["sources"]), facts["config"])


def near_names(name: str) -> list[str]:
    """At most three names that are close to a mistyped one, the closest first.

    >>> near_names("lama3-8b")[0]
    'llama-3-8b'
    """
    wanted = _letters(name.rpartition("/")[2])
    by_letters = {_letters(known): known for known in named_models()}
    return [by_letters[each] for each in difflib.get_close_matches(wanted, by_letters, n=3)]


def _letters(name: str) -> str:
    """A name without what people write differently."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
