"""The shapes that `headwise bench ops` runs by name, and by default: those of known models.

Each has the dtypes in which it is run where none are asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from headwise.errors import OptionError
from headwise.measure.shape import SYNTAX, Shape, parse_shape

HALF = ("bfloat16",)
# Tokens in a model's cache before the timed ones.
CONTEXTS = (100, 2000, 8000)


@dataclass(frozen=True)
class Preset:
    """A shape with a name."""

    name: str
    shape: str
    dtypes: tuple[str, ...]
    about: str


PRESETS = (
    Preset(
        "llama3-decode",
        "decode:32/8:d128:16k",
        ("bfloat16", "float32", "float16"),
        "Llama 3 8B, one token; in 3 dtypes",
    ),
    Preset("mha-decode", "decode:32/32:d128:16k", HALF, "Llama 2 7B's heads, one token"),
    Preset("mqa-decode", "decode:32/1:d128:16k", HALF, "one kv head, one token"),
    Preset("smollm2-decode", "decode:9/3:d64:2k", HALF, "SmolLM2-135M, one token"),
    Preset("batch-decode", "decode:32/8:d128:2k:b8", HALF, "8 sequences"),
    Preset("ragged-decode", "decode:32/8:d128:2k:b8:ragged", HALF, "8 sequences, unequal"),
    Preset("long-decode", "decode:32/8:d128:128k:vs8k", HALF, "a cached token at 128k and at 8k"),
    Preset("threads", "decode:32/8:d128:16k:vs1t", HALF, "all threads and one"),
    Preset("mla-16", "mla:16:8k", HALF, "DeepSeek-V2-Lite, one token"),
    Preset("mla-128", "mla:128:8k", HALF, "DeepSeek-V3, one token"),
    Preset("llama3-prefill", "prefill:32/8:d128:2k", HALF, "Llama 3 8B, a prompt"),
    Preset("mla-prefill", "prefill:16:d192/128:2k", HALF, "DeepSeek-V2-Lite's expanded heads"),
)


def select_shapes(names: Iterable[str], dtypes: Iterable[str] = ()) -> list[tuple[Shape, str]]:
    """Each asked shape with each of its dtypes; all presets where nothing is asked for.

    >>> [(str(shape), dtype) for shape, dtype in select_shapes(["mla-16", "decode:4:d8:64"])]
    [('mla:16:r512+64:d128:8k', 'bfloat16'), ('decode:4/4:d8:64', 'bfloat16')]

    Args:
        names: preset names and shapes as `parse_shape` reads them.
        dtypes: run each shape in these instead of the preset's own.

    Raises:
        OptionError: neither a preset nor a shape.
    """
    known, asked = {preset.name: preset for preset in PRESETS}, list(dtypes)
    chosen = []
    for name in list(names) or known:
        if name not in known and ":" not in name:
            raise OptionError(
                f"shape {name!r} is unknown; use one of {', '.join(known)}, or {SYNTAX}"
            )
        preset = known.get(name, Preset(name, name, HALF, ""))
        shape = parse_shape(preset.shape)
        chosen += [(shape, dtype) for dtype in asked or preset.dtypes]
    return chosen
