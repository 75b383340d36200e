"""`headwise_mla`: Llama with multi-head latent attention, what a converted checkpoint runs as.

Everything but the attention is Llama's. The attention differs from DeepSeek's MLA, so that any MHA
or GQA can be written in it: the latent is not normalised; the rotary pairs of the rope key turn
with chosen frequencies, in each layer its own; and each head meets them with complex multiples of
its own query's pairs, which commute with the rotation.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from headwise.hf.mla_config import HeadwiseMlaConfig
from headwise.hf.stock_names import (
    ALL_ATTENTION_FUNCTIONS,
    Cache,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    copy_,
    eager_attention_forward,
    normal_,
)


class HeadwiseMlaAttention(nn.Module):
    """One layer's attention: E hidden, H heads of D, and of this layer R, P and N.

    Pairs of dims stand for complex numbers in Llama's layout: all real parts, then all imaginary
    ones. Of a query's D/2 pairs, pair f turns with frequency f. Pair p of the rope key turns with
    frequency `rope_planes[p]`, and meets `rope_mix[h, p]` times that pair of head h's query.

    q_proj: E to H D. kv_a_proj: E to [latent | rope key], R + P. kv_b_proj: R to H (N + V).
    o_proj: H V to E. rope_planes: int64 [P/2], each in 0 .. D/2-1. rope_mix: [H, P/2, 2], real and
    imaginary parts.
    """

    def __init__(self, config: HeadwiseMlaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.kv_lora_rank = config.kv_lora_rank[layer_idx]
        self.qk_rope_head_dim = config.qk_rope_head_dim[layer_idx]
        self.qk_nope_head_dim = config.qk_nope_head_dim[layer_idx]
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = 1
        self.scaling = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        hidden, heads, pairs = config.hidden_size, self.num_heads, self.qk_rope_head_dim // 2
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        expanded = heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=config.query_key_bias)
        self.kv_a_proj = nn.Linear(hidden, cached, bias=config.query_key_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.attention_bias)
        self.rope_mix = nn.Parameter(torch.empty(heads, pairs, 2))
        self.rope_planes = nn.Buffer(torch.empty(pairs, dtype=torch.int64))

    def expand_kv(self, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Key [B,H,L,N+P] and value [B,H,L,V] of latent [B,1,L,R] and rope key [B,1,L,P]."""
        batch, _, context, _ = latent.shape
        size = self.qk_nope_head_dim + self.v_head_dim
        expanded = self.kv_b_proj(latent).view(batch, context, -1, size).transpose(1, 2)
        key, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key_rope = key_rope.expand(-1, self.num_heads, -1, -1)
        return torch.cat((key, key_rope), dim=-1) if self.qk_nope_head_dim else key_rope, value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: hidden_states [B,S,E], position_embeddings cos and sin [B,S,D]. Returns [B,S,E].

        attention_mask, cache and the rest are as in Transformers' other modules; the cache holds
        latents and rope keys, and they are expanded behind it. past_key_values is its name before
        Transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        batch, length, _ = hidden_states.shape
        # of both tables the second half repeats the first
        cos, sin = (
            table.index_select(-1, self.rope_planes).unsqueeze(1) for table in position_embeddings
        )
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, 2, -1)
        real, imaginary = query.index_select(-1, self.rope_planes).transpose(1, 2).unbind(3)
        mix_real, mix_imaginary = self.rope_mix.unsqueeze(1).unbind(-1)
        real, imaginary = _product(real, imaginary, mix_real, mix_imaginary)
        query_parts = _product(real, imaginary, cos, sin)
        if self.qk_nope_head_dim:
            query_parts = (query.flatten(3).transpose(1, 2), *query_parts)
        query = torch.cat(query_parts, dim=-1)

        pairs = len(self.rope_planes)
        latent, real, imaginary = (
            self.kv_a_proj(hidden_states)
            .unsqueeze(1)
            .split([self.kv_lora_rank, pairs, pairs], dim=-1)
        )
        key_rope = torch.cat(_product(real, imaginary, cos, sin), dim=-1)
        if cache is not None:
            latent, key_rope = cache.update(latent, key_rope, self.layer_idx, kwargs=kwargs)
        key, value = self.expand_kv(latent, key_rope)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(batch, length, -1)), weights


def _product(
    real: Tensor, imaginary: Tensor, by_real: Tensor, by_imaginary: Tensor
) -> tuple[Tensor, ...]:
    """Real and imaginary part of a product of complex numbers."""
    return (
        torch.addcmul(real * by_real, imaginary, by_imaginary, value=-1),
        torch.addcmul(imaginary * by_real, real, by_imaginary),
    )


class HeadwiseMlaDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with `HeadwiseMlaAttention`."""

    def __init__(self, config: HeadwiseMlaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = HeadwiseMlaAttention(config, layer_idx)


class HeadwiseMlaPreTrainedModel(LlamaPreTrainedModel):
    """What all models of `headwise_mla` share."""

    config: HeadwiseMlaConfig
    _no_split_modules: ClassVar = ["HeadwiseMlaDecoderLayer"]
    # keys as wide as all heads' together are more than these take
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs: ClassVar = {
        "hidden_states": HeadwiseMlaDecoderLayer,
        "attentions": HeadwiseMlaAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadwiseMlaAttention):
            # of mean square 1, so that a rope query is as large as the query that it is made of
            normal_(module.rope_mix, std=2**-0.5)
            pairs = torch.arange(len(module.rope_planes), device=module.rope_planes.device)
            copy_(module.rope_planes, pairs % (module.head_dim // 2))


# The constructors below go past those of their Llama, which would make Llama's layers first.


class HeadwiseMlaModel(HeadwiseMlaPreTrainedModel, LlamaModel):
    """Llama's decoder with `HeadwiseMlaAttention` in its layers."""

    def __init__(self, config: HeadwiseMlaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            HeadwiseMlaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class HeadwiseMlaForCausalLM(HeadwiseMlaPreTrainedModel, LlamaForCausalLM):
    """Llama's causal language model with `HeadwiseMlaAttention` in its layers.

    Example:
        >>> import torch
        >>> from headwise.hf import HeadwiseMlaConfig, HeadwiseMlaForCausalLM
        >>> config = HeadwiseMlaConfig(
        ...     vocab_size=99,
        ...     hidden_size=64,
        ...     intermediate_size=96,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     kv_lora_rank=[24, 32],
        ...     qk_rope_head_dim=[8, 32],
        ...     qk_nope_head_dim=[16, 0],
        ...     v_head_dim=16,
        ...     attention_scale=0.25,
        ... )
        >>> HeadwiseMlaForCausalLM(config)(torch.tensor([[5, 7, 11]])).logits.shape
        torch.Size([1, 3, 99])
    """

    def __init__(self, config: HeadwiseMlaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = HeadwiseMlaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
