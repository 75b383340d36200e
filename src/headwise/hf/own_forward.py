"""Families whose attention modules are not on Transformers' interface: Falcon and Bloom.

Their modules' `forward` is replaced on the instance. What stock stores as one key per query head is
cached as the true kv heads here (Falcon's new decoder architecture). A cache that holds keys in
stock's form already, as PEFT's prefix tuning makes it, keeps that form.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt_neo import modeling_gpt_neo

from headwise.hf.inner_model import OFF_THE_INTERFACE, refused_by_name
from headwise.hf.interface import headwise_attention_forward
from headwise.hf.owned import NAME, Owned


class FalconForward(Owned):
    """Stands in for the `forward` of a FalconAttention.

    The mask that the model makes holds its ALiBi already, if it has one: rounded to bfloat16,
    counted over what is not padding, divided by sqrt(D).
    """

    def __call__(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B,S,E] to what the module returns: [B,S,E], and weights where asked."""
        module = self.owner
        # stock has no dropout in its rotary layers
        if alibi is not None and module.training and module.attention_dropout.p:
            result: tuple[Tensor, Tensor | None] = type(module).forward(
                module,
                hidden_states,
                alibi,
                attention_mask,
                layer_past=layer_past,
                output_attentions=output_attentions,
            )
            return result
        query, key, value = _split(module, module.query_key_value(hidden_states))
        if position_embeddings is not None and alibi is None:
            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            query, key = rotate(query, key, *position_embeddings)
        if layer_past is not None:
            if _held_heads(layer_past, module.layer_idx) == module.num_heads != key.shape[1]:
                copies = module.num_heads // key.shape[1]
                key, value = (rows.repeat_interleave(copies, dim=1) for rows in (key, value))
            key, value = layer_past.update(key, value, module.layer_idx)
        out, weights = headwise_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=module.inv_norm_factor,
            output_attentions=output_attentions,
            eager=module.config._attn_implementation == "eager",
        )
        return module.dense(out.flatten(2)), weights


def _held_heads(cache: Any, index: int) -> int | None:
    """Heads of the keys that a layer of the cache holds, or has memory for; None for neither."""
    if index >= len(cache.layers) or not cache.layers[index].is_initialized:
        return None
    heads: int = cache.layers[index].keys.shape[1]
    return heads


def _split(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B,S,(H+2K)D] to query [B,H,S,D], key and value [B,K,S,D]."""
    heads, dim = module.num_heads, module.head_dim
    if module.new_decoder_architecture or module.multi_query:
        kv_heads = module.num_kv_heads
        parts = fused.unflatten(-1, (kv_heads, heads // kv_heads + 2, dim))
        query, key, value = parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
    else:
        query, key, value = fused.unflatten(-1, (heads, 3, dim)).unbind(-2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class BloomForward(Owned):
    """Stands in for the `forward` of a BloomAttention; ALiBi comes beside the mask."""

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states and residual [B,S,E], alibi [B*H,1,L]."""
        module = self.owner
        if module.training and module.attention_dropout.p:
            stock = type(module).forward
            given = (hidden_states, residual, alibi, attention_mask, layer_past)
            result: tuple[Tensor, Tensor] = stock(module, *given, use_cache, output_attentions)
            return result
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        bias, mask = alibi.unflatten(0, (-1, module.num_heads)), attention_mask
        # all that it says is hidden or not (stock takes no mask of the user's): in less memory
        if mask is not None:
            mask = mask == 0
        out, weights = headwise_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            scaling=module.inv_norm_factor,
            is_causal=attention_mask is None,
            position_bias=bias,
            output_attentions=output_attentions,
            eager=True,
        )
        functions = sys.modules[type(module).__module__]
        dropped: Tensor = functions.dropout_add(
            module.dense(out.flatten(2)), residual, module.hidden_dropout, module.training
        )
        return dropped, weights


# The attention class in Transformers' modeling file, and what stands in for its forward.
_FORWARDS: Mapping[str, type[Owned]] = {
    "FalconAttention": FalconForward,
    "BloomAttention": BloomForward,
}


class _RefusedByName:
    """In a family's table of attention classes: an error that says what to do, not a KeyError."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        raise refused_by_name(config.model_type, OFF_THE_INTERFACE)


def refuse_name() -> None:
    """Have the decoders that look their class up by the name refuse ours with a reason."""
    for classes in (
        modeling_falcon.FALCON_ATTENTION_CLASSES,
        modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES,
    ):
        classes[NAME] = _RefusedByName


def own_modules(model: PreTrainedModel) -> dict[str, Any]:
    """The attention modules whose forward has to be replaced, by name; none in other families."""
    return {name: at for name, at in model.named_modules() if _class_name(at) is not None}


def _class_name(module: Any) -> str | None:
    """The name in `_FORWARDS` that the module's class has or inherits from."""
    found = (
        base.__name__
        for base in type(module).__mro__
        if base.__module__.startswith("transformers.")
    )
    return next((name for name in found if name in _FORWARDS), None)


def obstacle(module: Any) -> str | None:
    """Why the forward of one of `own_modules` cannot be replaced; None if it can."""
    if type(module).__name__ not in _FORWARDS:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
        return "slow_but_exact multiplies in slices"
    return None


def replace(module: Any) -> None:
    """Put our forward on one of `own_modules`."""
    module.forward = _FORWARDS[type(module).__name__](module)


def cache_note(module: Any, dtype: torch.dtype) -> str:
    """What stock caches beyond the kv heads, as a line for a report; "" where it does not."""
    heads, kv_heads = module.num_heads, getattr(module, "num_kv_heads", module.num_heads)
    if not getattr(module, "new_decoder_architecture", False) or kv_heads == heads:
        return ""
    one = 2 * module.head_dim * dtype.itemsize
    return (
        f"the cache holds {kv_heads} kv heads, {kv_heads * one:,} bytes a token and layer, where "
        f"Transformers holds {heads} copies, {heads * one:,} bytes"
    )
