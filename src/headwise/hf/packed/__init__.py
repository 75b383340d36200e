"""Modules whose weights stay in the blocks of a GGUF file, and how a model gets them."""

from headwise.hf.packed.modules import PackedEmbedding, PackedLinear, weight_of
from headwise.hf.packed.replace import holders, packed_words, put_packed

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "holders",
    "packed_words",
    "put_packed",
    "weight_of",
]
