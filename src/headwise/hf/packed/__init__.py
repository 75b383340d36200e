"""Modules whose weights stay in the blocks of a GGUF file, and how a model gets them."""

from headwise.hf.packed.modules import PackedEmbedding, PackedLinear, makes_numbers, weight_of
from headwise.hf.packed.packing import (
    Packing,
    check_request,
    pack_model,
    packed_formats,
    packed_words,
    unpack_model,
)
from headwise.hf.packed.replace import holders, put_packed

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "Packing",
    "check_request",
    "holders",
    "makes_numbers",
    "pack_model",
    "packed_formats",
    "packed_words",
    "put_packed",
    "unpack_model",
    "weight_of",
]
