"""The mask function that Transformers calls for a model attached to headwise.

It says None only where the mask is exactly the operator's own causal rule (the last query sits on
the last key), or where nothing is masked. A causal window is a rule too, in a `WindowMask`;
anything else is spelled out as a boolean mask. Modules that are not causal although their mask is
(Gemma's, with use_bidirectional_attention) take None for no mask at all: they get it where
Transformers' SDPA does, for one query and for a prompt without padding, and nowhere else.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.hf.empty_rows import share
from headwise.hf.inner_model import refusal, refused_by_name
from headwise.hf.module_hook import AttachedName, makes_graph
from headwise.hf.stock_names import (
    causal_mask_function,
    is_torchdynamo_exporting,
    is_tracing,
    sdpa_mask,
)
from headwise.hf.window_mask import WindowMask, is_window
from headwise.spec import family_of


def headwise_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Boolean mask [B, 1, S, L], True = attend, or None where the operator needs none."""
    attached = isinstance(getattr(config, "_attn_implementation", None), AttachedName)
    reason = None if config is None or attached else _refusal(type(config))
    if reason is not None:
        raise refused_by_name(config.model_type, reason)
    spelled_out = config is not None and _is_unread(type(config))
    if _has_padding(attention_mask, kv_length, kv_offset) is False:
        aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        if allow_is_causal_skip and aligned:
            if local_size is None or kv_length < local_size:
                if not _none_hides_nothing(config) and not spelled_out:
                    return None
            elif not makes_graph() and is_window(mask_function, local_size):
                if q_length == 1 and kv_length == local_size:
                    return None  # hides nothing
                size = (batch_size, 1, q_length, kv_length)
                return WindowMask(size, local_size, torch.device(kwargs.get("device", "cpu")))
        # a causal module takes None for its causal rule, so only say it where modules are not
        encoder = getattr(config, "is_causal", True) is not False
        if allow_is_bidirectional_skip and encoder and local_size is None and not spelled_out:
            return None
    mask: Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip
        and _none_hides_nothing(config)
        and not spelled_out
        and (q_length == 1 or not runs_eagerly(type(config))),
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    return mask if mask is None or is_tracing(mask) else share(mask)


@torch.compiler.assume_constant_result  # a compiler runs it, and does not trace it
def _refusal(kind: type) -> str | None:
    """Why the models of a class of configs cannot run on ours; None if they can."""
    return _read_refusal(kind)


@cache
def _read_refusal(kind: type) -> str | None:
    reasons = [refusal(model, getattr(kind, "model_type", "")) for model in _models(kind)]
    return reasons[0] if reasons and all(reasons) else None


@torch.compiler.assume_constant_result
def runs_eagerly(kind: type) -> bool:
    """Whether stock has no SDPA for a class of configs: then it has a mask for every prompt."""
    models = _models(kind)
    return bool(models) and not any(model._supports_sdpa for model in models)


def _is_unread(kind: type) -> bool:
    """Whether, besides, nothing says that its modules know their own rule."""
    return runs_eagerly(kind) and family_of(getattr(kind, "model_type", None)) is None


@cache
def _models(kind: type) -> list[Any]:
    """The model classes that take a class of configs."""
    # Transformers' files, and those that follow it, come in pairs
    name = kind.__module__.replace("configuration_", "modeling_")
    module = sys.modules.get(name)
    models: list[Any] = [
        model
        for model in ({} if module is None else vars(module)).values()
        if isinstance(model, type)
        and issubclass(model, PreTrainedModel)
        and model.__module__ == name
    ]
    return [model for model in models if model.config_class is kind] or models


def _none_hides_nothing(config: Any) -> bool:
    """Whether modules are not causal although their mask is, and take None for no mask at all."""
    return getattr(config, "use_bidirectional_attention", None) is True


def _has_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> bool | None:
    """Whether any key in use is padding; None where that cannot be read (while tracing)."""
    if is_torchdynamo_exporting():
        return None
    if attention_mask is None:
        return False
    if is_tracing(attention_mask):
        return None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    # keys that the 2D mask does not reach count as padding
    return seen.shape[1] < kv_length or not bool(seen.all())
