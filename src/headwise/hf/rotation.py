"""Rotations that depend on how long the text is: which models have them, and what they remember."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Kinds of RoPE whose angles depend on a token's own position and nothing else.
_FIXED = frozenset({"default", "linear", "yarn", "llama3", "proportional"})


def length_free(model: Any) -> bool:
    """Whether each token's rotation depends on its position alone, not on the text's length.

    False for LongRoPE and dynamic NTK, also where one kind of layer has them, and for a kind of
    RoPE that is not known.
    """
    kinds = list(_of_config(model.config.to_dict(), inside=False))
    kinds += [kind for _, _, kind in _of_modules(model)]
    return all(isinstance(kind, str) and kind in _FIXED for kind in kinds)


def forget_length(model: Any) -> None:
    """Take dynamic NTK's frequencies back to those of a model that has just been loaded.

    Transformers keeps those of the longest text so far until a module sees a short one.
    """
    for module, arguments, kind in _of_modules(model):
        if "dynamic" in str(kind):
            first = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            module(torch.empty(0, device=model.device), first, *arguments)


def _of_modules(model: Any) -> Iterator[tuple[Any, tuple[str, ...], object]]:
    """Each rotary module with the arguments that choose a kind of layer, and the kind of RoPE."""
    for module in model.modules():
        own = getattr(module, "rope_type", None)
        if isinstance(own, Mapping):
            yield from ((module, (str(layers),), kind) for layers, kind in own.items())
        elif own is not None:
            yield module, (), own


def _of_config(node: object, *, inside: bool) -> Iterator[object]:
    """Each kind of RoPE that a config names, under `rope_parameters`, `rope_scaling` or so."""
    if isinstance(node, list | tuple):
        for value in node:
            yield from _of_config(value, inside=inside)
    elif isinstance(node, Mapping):
        if inside:
            yield from (node[name] for name in ("rope_type", "type") if name in node)
        for name, value in node.items():
            yield from _of_config(value, inside=inside or "rope" in str(name))


def regime(model: Any, first: int, length: int) -> str | None:
    """Within which lengths a text's rotations are all alike: "" where they always are.

    `first` tokens were read at once, and then up to `length`. None where some were rotated
    otherwise than others.
    """
    if length_free(model):
        return ""
    kinds = {str(kind) for _, _, kind in _of_modules(model) if kind not in _FIXED}
    named = set(_named(model.config.to_dict(), "original_max_position_embeddings"))
    trained = {int(getattr(m, "original_max_seq_len", 0)) for m, _, _ in _of_modules(model)}
    limits = named if kinds == {"longrope"} and named else named | trained
    limit = min(limits, default=0)
    if length < limit:
        return f"below {limit} tokens"
    if kinds == {"longrope"} and first > max(limits):
        return f"above {max(limits)} tokens"
    return None


def _named(node: object, name: str) -> Iterator[int]:
    """Each whole number under a name in a config."""
    if isinstance(node, list | tuple):
        for value in node:
            yield from _named(value, name)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key == name and isinstance(value, int):
                yield value
            yield from _named(value, name)
