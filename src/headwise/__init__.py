"""Decoder attention as one family: MHA, MQA, GQA and MLA, each with the KV cache that it needs."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from headwise import nn
from headwise.errors import (
    CapacityError,
    ConversionError,
    HeadwiseError,
    LoadError,
    OptionError,
    RankError,
    ShapeError,
    SpecError,
    UnsupportedError,
)
from headwise.ops import (
    PagedKV,
    QuantKV,
    attention,
    causal_conv1d,
    explain,
    latent_attention,
    linear_attention,
    merge_attention,
)
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec

if TYPE_CHECKING:
    from headwise.comparison import compare
    from headwise.conversion import convert
    from headwise.hf import AttachReport, detach, load_cache, recall, remember, save_cache
    from headwise.hf import attach as attach
    from headwise.loading import load as load  # `as`: else mypy stumbles over an import cycle
    from headwise.planning import plan
    from headwise.viewing import view as view

__version__ = "0.1.0"

__all__ = [
    "AttachReport",
    "AttentionSpec",
    "CapacityError",
    "ConversionError",
    "HeadwiseError",
    "LayerSpec",
    "LoadError",
    "ModelSpec",
    "OptionError",
    "PagedKV",
    "QuantKV",
    "RankError",
    "ShapeError",
    "SpecError",
    "UnsupportedError",
    "attach",
    "attention",
    "causal_conv1d",
    "compare",
    "convert",
    "detach",
    "explain",
    "latent_attention",
    "linear_attention",
    "load",
    "load_cache",
    "merge_attention",
    "nn",
    "plan",
    "recall",
    "remember",
    "save_cache",
    "view",
]

# Transformers takes seconds to import, and the operators and specs do without it.
_NEEDS_TRANSFORMERS = (
    *("AttachReport", "attach", "convert", "detach", "load", "load_cache", "plan", "recall"),
    *("remember", "save_cache", "view"),
)
_HOMES = {"convert": "conversion", "load": "loading", "plan": "planning", "view": "viewing"}
# Packages that docs/api.md has names of, and that are imported when they are asked for.
_PACKAGES = ("comparison", "conversion", "hf", "planning", "viewing")


def __dir__() -> list[str]:
    names = {*__all__, *_PACKAGES, "caches", "errors", "ops", "spec"}
    if find_spec("transformers") is None:
        names -= {*_NEEDS_TRANSFORMERS, *_PACKAGES} - {"comparison"}
    return sorted(names)


def __getattr__(name: str) -> Any:
    if name == "compare":
        from headwise.comparison import compare

        return compare
    if name not in (*_NEEDS_TRANSFORMERS, *_PACKAGES):
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    home = _HOMES.get(name, "hf")
    try:
        module = import_module(f"headwise.{name if name in _PACKAGES else home}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ModuleNotFoundError(
            f"headwise.{name} needs Transformers: pip install 'headwise[hf]'",
            name="transformers",
        ) from None
    return module if name in _PACKAGES else getattr(module, name)
