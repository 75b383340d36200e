"""Which models give the same when they read a text in parts, each after a cache."""

import inspect
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import FAULTS, reason
from headwise.errors import HeadwiseError, SpecError
from headwise.hf.cache import use_own_layers
from headwise.hf.rotation import length_free
from headwise.hf.stock_names import CACHE, DynamicCache, get_layer_types_and_kwargs
from headwise.spec import ModelSpec

# Transformers' names of the layers whose keys a cache holds as they are: all, or a window's.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "indexed_attention"})


def reads_in_chunks(model: Any) -> bool:
    """Whether the model gives the same when it reads a text in chunks, each after a cache.

    True for a decoder of text alone, of Transformers or of headwise, all of whose layers are
    covered by `ModelSpec` and attend to all earlier tokens or to a window, and none of whose
    rotations depends on how long the text is.
    """
    return length_free(model) and _is_plain(model)


def obstacle_to_continue(model: Any) -> str | None:
    """Why a text must not be read in parts, however long it is; None if it may.

    Rotations that depend on the length are another matter (`regime`). An attached model of a kind
    that is not known to continue exactly is tried, once: it reads twelve tokens at once, and in
    parts, the last of which is a step.
    """
    if model.config.is_encoder_decoder:
        return "an encoder-decoder"
    attachment = model._headwise
    if "_prepare_cache_for_generation" not in model.__dict__:
        return "it makes no cache that headwise holds"
    if model.training:
        return "the model is in training mode"
    if _is_plain(model):
        return None
    if attachment.continues is None:
        attachment.continues = _differs_in_parts(model)
    return attachment.continues or None


@torch.no_grad()
def _differs_in_parts(model: Any) -> str:
    """What is wrong with a text that is read in parts; "" where nothing is."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(10, 22, device=model.device)[None] % config.vocab_size
    try:
        (whole,) = _read(model, [ids])
        *_, rest = _read(model, [ids[:, :7], ids[:, 7:11], ids[:, 11:]])
    except (*FAULTS, HeadwiseError) as error:
        return f"it cannot be read in parts: {reason(error)}"
    exact = whole.dtype in (torch.float32, torch.float64)
    bound = 1e-4 if exact else 4 * torch.finfo(torch.bfloat16).eps
    whole, rest = whole[:, -1].double(), rest[:, -1].double()
    apart = (whole - rest).abs().max() / whole.abs().max()
    return "" if apart <= bound else f"read in parts it differs by {float(apart):.0e}"


def _read(model: Any, parts: list[Tensor]) -> list[Tensor]:
    """The logits of parts of a text, each after those before it; no hooks of the model are run."""
    config = model.config.get_text_config(decoder=True)
    cache = use_own_layers(DynamicCache(config=config), model._headwise.choice)
    logits, length = [], 0
    for ids in parts:
        inputs = model.prepare_inputs_for_generation(
            ids,
            is_first_iteration=not length,
            **{CACHE: cache, "use_cache": True},
            position_ids=torch.arange(length, length + ids.shape[1], device=ids.device)[None],
        )
        known = inspect.signature(type(model).forward).parameters
        if "position_ids" not in known:
            inputs.pop("position_ids", None)
        logits.append(type(model).forward(model, **inputs).logits)
        length += ids.shape[1]
    return logits


def read_part(model: Any, cache: Any, ids: Tensor, begin: int, end: int) -> None:
    """Read tokens `begin` to `end` of ids [B, L] into a cache of those before them.

    Through the model itself, hooks and all, as its `generate` reads a prompt without padding.
    """
    options: dict[str, Any] = {CACHE: cache, "use_cache": True}
    if model._supports_logits_to_keep():
        options["logits_to_keep"] = 1
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        positions = torch.arange(begin, end, device=ids.device)
        options["position_ids"] = positions.expand(len(ids), -1)
    inputs = model.prepare_inputs_for_generation(
        ids[:, :end], next_sequence_length=end - begin, is_first_iteration=not begin, **options
    )
    model(**inputs, return_dict=True)


def _is_plain(model: Any) -> bool:
    """Whether it is known to be so but for rotations."""
    config = model.config
    # code that came with a checkpoint may do anything, whatever its config says
    known = type(model).__module__.split(".")[0] in ("transformers", "headwise")
    # beside images the mask may be open over the whole prompt
    text_alone = config.get_text_config(decoder=True) is config and not config.is_encoder_decoder
    if not (known and text_alone) or model._is_stateful:
        return False
    if any(module.__dict__.get("is_causal") is False for module in model.modules()):
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
