"""What headwise knows of GGUF's architectures beyond what config classes and tensors show."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture, as `general.architecture` names it.

    Args:
        name: as files name it; the fields of the architecture begin with it.
        model_type: that Transformers' reader should say, where it says another one.
        needs: fields that Transformers' reader cannot do without.
        passes: fields that are right whatever they say: the rotation or the tensors state them.
        neutral: values of fields that its class computes with by itself.
        head_dim: the field that states the config's `head_dim`.
        scaled_by_width: the number of blocks of the model whose scores are scaled by E / H instead
            of by D. No field says so, so llama.cpp, too, tells it by the number of blocks.
        partial_rope: its class can rotate a part of a head; others rotate it whole or fail.
        local_rope: its sliding layers turn with a base of their own.
        states_rope: its rotation is that of its config class, whatever a file says.
    """

    name: str
    model_type: str | None = None
    needs: tuple[str, ...] = ()
    passes: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    head_dim: str = "attention.key_length"
    scaled_by_width: int | None = None
    partial_rope: bool = False
    local_rope: bool = False
    states_rope: bool = False


_TWO_BASES = frozenset({"rope.freq_base_swa", "rope.dimension_count_swa"})
_TWO_SIZES = frozenset(
    f"attention.{name}_length{layers}" for name in ("key", "value") for layers in ("", "_swa")
)

_DECLARED = (
    Architecture(name="bloom", neutral={"attention.max_alibi_bias": (8,)}),
    Architecture(name="gemma2", scaled_by_width=46),
    Architecture(name="gemma3", scaled_by_width=62, local_rope=True, passes=_TWO_BASES),
    Architecture(
        name="gemma4",
        passes=_TWO_BASES | _TWO_SIZES,
        head_dim="attention.key_length_swa",  # key_length is that of full attention
        states_rope=True,
    ),
    # Of a file whose name is "mistral" Transformers makes a Mistral with a window of 4096 that the
    # file does not say, and then finds no names for its tensors. Without a number of kv heads there
    # are as many as heads, but the reader leaves queries and keys in the order that rotates other
    # pairs.
    Architecture(name="llama", model_type="llama", needs=("attention.head_count_kv",)),
    Architecture(name="minimax-m2", neutral={"expert_gating_func": (2,)}),
    Architecture(name="nemotron", partial_rope=True),
    Architecture(name="phi3", partial_rope=True),
    Architecture(name="stablelm", partial_rope=True),
)
_ARCHITECTURES = {each.name: each for each in _DECLARED}


def architecture_of(name: str) -> Architecture:
    """What is known of an architecture; one that is not listed needs nothing special.

    >>> architecture_of("phi3").partial_rope, architecture_of("qwen3").partial_rope
    (True, False)
    """
    return _ARCHITECTURES.get(name, Architecture(name=name))
