"""Falcon, which is not on Transformers' interface: its modules' `forward` is replaced.

What stock stores as one key per query head is cached as the true kv heads here (its new decoder
architecture). A cache that holds keys in stock's form already, as PEFT's prefix tuning makes it,
keeps that form.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from headwise.hf.interface import headwise_attention_forward
from headwise.hf.module_hook import ModuleHook


class FalconForward(ModuleHook):
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
