"""headwise inside Hugging Face Transformers. Importing this package imports Transformers."""

from headwise.hf.attach import attach, detach
from headwise.hf.cache import ContiguousLayer, cache_nbytes, use_contiguous_layers
from headwise.hf.report import AttachReport, LayerReport

__all__ = [
    "AttachReport",
    "ContiguousLayer",
    "LayerReport",
    "attach",
    "cache_nbytes",
    "detach",
    "use_contiguous_layers",
]
