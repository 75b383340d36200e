"""headwise inside Hugging Face Transformers. Importing this package imports Transformers."""

from headwise.hf.attach import attach, detach
from headwise.hf.cache import (
    ContiguousLayer,
    SinksLayer,
    ViewLayer,
    WindowLayer,
    cache_nbytes,
    use_own_layers,
)
from headwise.hf.report import AttachReport, LayerReport

__all__ = [
    "AttachReport",
    "ContiguousLayer",
    "LayerReport",
    "SinksLayer",
    "ViewLayer",
    "WindowLayer",
    "attach",
    "cache_nbytes",
    "detach",
    "use_own_layers",
]
