"""Which models may read a prompt in chunks: those for which nothing depends on where it is cut.

Transformers' `generate` reads a prompt in one piece, unless its `prefill_chunk_size` says another.
Chunks bound the memory of the activations, and show how far a long prompt is. But a rotation that
depends on the length turns the keys of each chunk by other angles, and a convolution, a state or a
mask over the whole prompt may restart at each. So this is a list of what is known to be exact;
whatever is not on it reads the whole prompt.
"""

from typing import Any

from headwise.hf.continued import reads_in_chunks

CHUNK = 512


def chunk_size(model: Any) -> int | None:
    """How many tokens of a prompt `model` reads at once; None: all of them.

    What its generation config asks for, as in Transformers. Else an attached model reads 512 at
    once where that is exact. Stock attention reads as `model.generate` does, so that whoever
    compares with it compares with that, and a chunk that is not exact cannot be in both.
    """
    asked: int | None = model.generation_config.prefill_chunk_size
    if asked is not None:
        return asked
    return CHUNK if "_headwise" in model.__dict__ and reads_in_chunks(model) else None
