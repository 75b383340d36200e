"""Which models may read a prompt in chunks: those for which nothing depends on where it is cut.

Transformers' `generate` reads a prompt in one piece, unless its `prefill_chunk_size` says another.
Chunks bound the memory of the activations, and show how far a long prompt is. But a rotation that
depends on the length turns the keys of each chunk by other angles, and a convolution, a state or a
mask over the whole prompt may restart at each. So this is a list of what is known to be exact;
whatever is not on it reads the whole prompt.
"""

from typing import Any

from headwise.hf.continued import reads_in_chunks
from headwise.hf.packed import makes_numbers

CHUNK = 512
# Where each chunk makes numbers of packed weights, which takes what 512 tokens take.
_LARGER = 8


def chunk_size(model: Any) -> int | None:
    """How many tokens of a prompt `model` reads at once; None: all of them.

    What its generation config asks for, as in Transformers. Else an attached model reads 512 at
    once where that is exact, or 4,096 where packed weights are made numbers for each. Stock
    attention reads as `model.generate` does, so that whoever compares with it compares with that,
    and a chunk that is not exact cannot be in both.
    """
    asked: int | None = model.generation_config.prefill_chunk_size
    if asked is not None:
        return asked
    if "_headwise" not in model.__dict__ or not reads_in_chunks(model):
        return None
    return CHUNK * _LARGER if makes_numbers(model) else CHUNK
