"""The families that can be converted, by Transformers' model_type: the one list of them."""

from typing import Literal

Kind = Literal["linear", "latent", "normalised"]
"""What the keys and values of a family are made by: "linear" projections of the hidden state under
Llama's names; a "latent" that is linear in it; or a latent that is "normalised" first."""

_KINDS: dict[str, Kind] = {
    "llama": "linear",
    "mistral": "linear",
    "qwen2": "linear",
    "headwise_mla": "latent",
    "deepseek_v2": "normalised",
    "deepseek_v3": "normalised",
}


def kind_of(model_type: str) -> Kind | None:
    """The kind of a family; None for one that is not covered.

    >>> kind_of("mistral"), kind_of("gpt2")
    ('linear', None)
    """
    return _KINDS.get(model_type)


def families(*kinds: Kind) -> str:
    """The families of these kinds, for messages.

    >>> families("latent", "normalised")
    'headwise_mla, deepseek_v2, deepseek_v3'
    """
    return ", ".join(name for name, kind in _KINDS.items() if kind in kinds)
