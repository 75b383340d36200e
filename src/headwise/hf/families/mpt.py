"""MPT, which is not on Transformers' interface: the `forward` of its blocks is replaced.

That of its attention would do, but is not told when the weights are asked for.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.hf.interface import headwise_attention_forward
from headwise.hf.module_hook import ModuleHook


class MptForward(ModuleHook):
    """Stands in for the `forward` of an MptBlock; ALiBi comes beside the mask."""

    def __call__(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B,S,E], position_bias [H,1,>=L]; attention_mask is True where hidden."""
        block = self.owner
        attention = block.attn
        if block.training and attention.attn_dropout_p:
            stock = type(block).forward
            result: tuple[Tensor, Tensor] = stock(
                block, hidden_states, position_bias, attention_mask, layer_past
            )
            return result
        fused = attention.Wqkv(block.norm_1(hidden_states))
        if attention.clip_qkv:
            fused = fused.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
        heads = fused.unflatten(-1, (3, attention.n_heads, attention.head_dim))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(-3))
        if layer_past is not None:
            key, value = layer_past.update(key, value, attention.layer_idx)
        out, weights = headwise_attention_forward(
            attention,
            query,
            key,
            value,
            ~attention_mask,
            scaling=attention.softmax_scale,
            position_bias=position_bias[None, :, :, -key.shape[2] :],
            output_attentions=output_attentions,
            eager=True,
        )
        if torch.is_grad_enabled():
            # the scores of a row that sees nothing are overwritten in stock: no gradient to them
            empty = attention_mask.all(-1).transpose(1, 2).unsqueeze(-1)
            out = torch.where(empty, value.mean(2).unsqueeze(1), out)
        out = attention.out_proj(out.flatten(2))
        hidden_states = block.resid_attn_dropout(out) + hidden_states
        return block.ffn(block.norm_2(hidden_states), hidden_states), weights
