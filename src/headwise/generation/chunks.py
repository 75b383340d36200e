"""Which models may read a prompt in chunks: those for which nothing depends on where it is cut.

Transformers' `generate` reads a prompt in one piece, unless its `prefill_chunk_size` says another.
Chunks bound the memory of the activations, and show how far a long prompt is. But a rotation that
depends on the length turns the keys of each chunk by other angles, and a convolution, a state or a
mask over the whole prompt may restart at each. So this is a list of what is known to be exact;
whatever is not on it reads the whole prompt.
"""

from typing import Any

from headwise.errors import SpecError
from headwise.generation.rotation import length_free
from headwise.hf.stock_names import get_layer_types_and_kwargs
from headwise.spec import ModelSpec

CHUNK = 512

# Transformers' names of the layers whose keys a cache holds as they are: all, or a window's.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "indexed_attention"})


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


def reads_in_chunks(model: Any) -> bool:
    """Whether the model gives the same when it reads a text in chunks, each after a cache.

    True for a decoder of text alone, of Transformers or of headwise, all of whose layers are
    covered by `ModelSpec` and attend to all earlier tokens or to a window, and none of whose
    rotations depends on how long the text is.
    """
    config = model.config
    # code that came with a checkpoint may do anything, whatever its config says
    known = type(model).__module__.split(".")[0] in ("transformers", "headwise")
    # beside images the mask may be open over the whole prompt
    text_alone = config.get_text_config(decoder=True) is config and not config.is_encoder_decoder
    if not (known and text_alone and length_free(model)) or model._is_stateful:
        return False
    try:
        layers = ModelSpec.from_config(config).layers
    except SpecError:
        return False
    kept = [layer.cached for layer in layers if layer.cross_attention is None]
    return (
        len(kept) == len(layers) > 0
        and all(attention is not None for attention in kept)
        and set(get_layer_types_and_kwargs(config)[0]) <= _ATTENTION
    )
