"""DeepSeek-V2 and V3 that cache keys and values: MLA expanded to MHA, with the weights as they are.

DeepSeek normalises its latent, so that keys and values are not linear in the hidden state and no
stock MHA can hold the model. These compute each token's keys and values once, when it comes, and
cache H (N + P + V) elements a token in place of R + P: for checking, and to attend as MHA does.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
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


class _Expanded:
    """DeepSeek's attention with keys and values in the cache."""

    def expand_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What stock expands behind its cache is expanded already."""
        return key, value

    def forward(
        self, hidden_states: Tensor, *, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B,S,E] to [B,S,E], and weights where asked."""
        stock: Any = super()
        # stock's expansion, of the new tokens alone
        return stock.forward(hidden_states, cache=_Expanding(cache, stock.expand_kv), **kwargs)


class DeepseekV2MhaAttention(_Expanded, DeepseekV2Attention):
    """DeepSeek-V2's attention with keys and values in the cache."""


class DeepseekV3MhaAttention(_Expanded, DeepseekV3Attention):
    """DeepSeek-V3's attention with keys and values in the cache."""


class DeepseekV2MhaConfig(DeepseekV2Config):
    """DeepSeek-V2's config."""

    model_type = "headwise_deepseek_v2_mha"


class DeepseekV3MhaConfig(DeepseekV3Config):
    """DeepSeek-V3's config."""

    model_type = "headwise_deepseek_v3_mha"


_OWN: dict[type, type] = {
    DeepseekV2Attention: DeepseekV2MhaAttention,
    DeepseekV3Attention: DeepseekV3MhaAttention,
}


class _ExpandedModel:
    """A DeepSeek model whose attention modules are ours: the same weights, and another forward."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        for module in self.modules():
            module.__class__ = _OWN.get(type(module), type(module))

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
