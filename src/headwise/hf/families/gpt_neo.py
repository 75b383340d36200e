"""GPT-Neo and GPT-NeoX Japanese, which are not on the interface: their `forward` is replaced."""

import sys
from typing import Any

import torch
from torch import Tensor

from headwise.hf.interface import headwise_attention_forward
from headwise.hf.module_hook import ModuleHook


class GptNeoForward(ModuleHook):
    """Stands in for the `forward` of a GPTNeoSelfAttention, whose scores are not scaled."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B,S,E]; attention_mask additive, [B,1,S,L], without a local window."""
        module = self.owner
        if module.training and module.attn_dropout.p:
            result: tuple[Tensor, Tensor] = type(module).forward(
                module, hidden_states, attention_mask, layer_past
            )
            return result
        heads = (module.num_heads, module.head_dim)
        query, key, value = (
            project(hidden_states).unflatten(-1, heads).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_id)
        length, context = query.shape[2], key.shape[2]
        seen = module.bias[:, :, context - length : context, :context]
        mask = torch.where(seen, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        # what both hide is -inf then, as in stock: a row of padding averages the other keys
        mask = mask if attention_mask is None else mask + attention_mask
        out, weights = headwise_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            scaling=1.0,
            output_attentions=output_attentions,
            eager=True,
        )
        return module.resid_dropout(module.out_proj(out.flatten(2))), weights


class GptNeoXJapaneseForward(ModuleHook):
    """Stands in for the `forward` of a GPTNeoXJapaneseAttention."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states [B,S,E] to what the module returns, a bias that is added later last."""
        module = self.owner
        if module.training and module.attention_dropout.p:
            result: tuple[Tensor, Tensor, Tensor | None] = type(module).forward(
                module,
                hidden_states,
                attention_mask,
                position_ids,
                layer_past,
                position_embeddings=position_embeddings,
            )
            return result
        heads = (module.num_attention_heads, 3 * module.head_size)
        fused = module.query_key_value(hidden_states).unflatten(-1, heads).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        turned = module.rotary_ndims
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        first = rotate(query[..., :turned], key[..., :turned], *position_embeddings)
        query, key = (
            torch.cat([part, rows[..., turned:]], dim=-1)
            for part, rows in zip(first, (query, key), strict=True)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        out, weights = headwise_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=1.0 / module.norm_factor,
            output_attentions=output_attentions,
            eager=True,
        )
        return module.dense(out.flatten(2)), weights, module.dense_bias
