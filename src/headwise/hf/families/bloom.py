"""Bloom, which is not on Transformers' interface: its modules' `forward` is replaced."""

import sys
from typing import Any

from torch import Tensor

from headwise.hf.interface import headwise_attention_forward
from headwise.hf.module_hook import ModuleHook


class BloomForward(ModuleHook):
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
            inputs = (hidden_states, residual, alibi, attention_mask, layer_past)
            result: tuple[Tensor, Tensor] = stock(module, *inputs, use_cache, output_attentions)
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
