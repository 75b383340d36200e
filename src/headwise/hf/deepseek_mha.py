"""DeepSeek-V2 and V3 that cache keys and values: MLA expanded to MHA, with the weights as they are.

DeepSeek normalises its latent, so that keys and values are not linear in the hidden state and no
stock MHA can hold the model. These compute each token's keys and values once, when it comes, and
cache H (N + P + V) elements per token in place of R + P: for checking, and to attend as MHA does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
)

from headwise.hf.stock_names import (
    CACHE,
    Cache,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class _Expanding:
    """Stands before a cache: takes a module's latents, and stores and hands on keys and values."""

    def __init__(self, cache: Cache | None, expand: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.cache, self.expand = cache, expand

    def update(
        self, latent: Tensor, key_rope: Tensor, layer_idx: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Latent [B,1,S,R] and rope key [B,1,S,P] to keys [B,H,L,N+P] and values [B,H,L,V]."""
        key, value = self.expand(latent, key_rope)
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, layer_idx, **options)


def _expanded(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for `expand_kv`: what stock expands behind its cache is expanded already."""
    return key, value


def _expand_first(
    module: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before an attention module: new tokens are expanded, and then cached."""
    expand = partial(type(module).expand_kv, module)
    return inputs, options | {CACHE: _Expanding(options.get(CACHE), expand)}


class DeepseekV2MhaConfig(DeepseekV2Config):
    """DeepSeek-V2's config."""

    model_type = "headwise_deepseek_v2_mha"


class DeepseekV3MhaConfig(DeepseekV3Config):
    """DeepSeek-V3's config."""

    model_type = "headwise_deepseek_v3_mha"


class _ExpandedModel:
    """A DeepSeek model whose attention modules expand what they cache: the same weights."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for module in model.modules():
            if hasattr(module, "expand_kv"):
                module.expand_kv = _expanded
                module.register_forward_pre_hook(_expand_first, with_kwargs=True)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the experts in the file of the class; they are stock's
        return True


class DeepseekV2MhaModel(_ExpandedModel, DeepseekV2Model):
    """DeepSeek-V2's decoder with keys and values in the cache."""

    config: DeepseekV2MhaConfig


class DeepseekV2MhaForCausalLM(_ExpandedModel, DeepseekV2ForCausalLM):
    """DeepSeek-V2 with keys and values in the cache."""

    config: DeepseekV2MhaConfig


class DeepseekV3MhaModel(_ExpandedModel, DeepseekV3Model):
    """DeepSeek-V3's decoder with keys and values in the cache."""

    config: DeepseekV3MhaConfig


class DeepseekV3MhaForCausalLM(_ExpandedModel, DeepseekV3ForCausalLM):
    """DeepSeek-V3 with keys and values in the cache."""

    config: DeepseekV3MhaConfig


MHA_CONFIGS: dict[str, Any] = {
    "deepseek_v2": DeepseekV2MhaConfig,
    "deepseek_v3": DeepseekV3MhaConfig,
}


def register_weights() -> None:
    """Have Transformers read the weights as it reads DeepSeek's: one tensor for all experts."""
    for stock, own in MHA_CONFIGS.items():
        mapping = get_checkpoint_conversion_mapping(stock)
        register_checkpoint_conversion_mapping(own.model_type, mapping, overwrite=True)
