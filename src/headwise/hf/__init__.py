"""headwise inside Hugging Face Transformers. Importing this package imports Transformers.

It makes our attention known to Transformers, for `from_pretrained(...,
attn_implementation="headwise")`, and our own model types to its Auto classes, so that a converted
checkpoint loads as any other and needs no code of its own: `headwise_mla`, and DeepSeek-V2 and V3
expanded to MHA.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from headwise.hf.attach import attach, detach
from headwise.hf.cache import cache_nbytes, read_nbytes, use_own_layers
from headwise.hf.cache_layers import ContiguousLayer, SinksLayer, ViewLayer, WindowLayer
from headwise.hf.deepseek_mha import (
    DeepseekV2MhaConfig,
    DeepseekV2MhaForCausalLM,
    DeepseekV2MhaModel,
    DeepseekV3MhaConfig,
    DeepseekV3MhaForCausalLM,
    DeepseekV3MhaModel,
    register_weights,
)
from headwise.hf.families import refuse_name
from headwise.hf.interface import register
from headwise.hf.mla_config import HeadwiseMlaConfig
from headwise.hf.mla_model import HeadwiseMlaForCausalLM, HeadwiseMlaModel
from headwise.hf.own_cache import OwnCache
from headwise.hf.report import AttachReport, LayerReport
from headwise.hf.stored import Remembered, load_cache, recall, remember, save_cache

__all__ = [
    "AttachReport",
    "ContiguousLayer",
    "DeepseekV2MhaConfig",
    "DeepseekV2MhaForCausalLM",
    "DeepseekV3MhaConfig",
    "DeepseekV3MhaForCausalLM",
    "HeadwiseMlaConfig",
    "HeadwiseMlaForCausalLM",
    "LayerReport",
    "Remembered",
    "OwnCache",
    "SinksLayer",
    "ViewLayer",
    "WindowLayer",
    "attach",
    "cache_nbytes",
    "detach",
    "load_cache",
    "recall",
    "remember",
    "save_cache",
    "read_nbytes",
    "use_own_layers",
]

for _config, _model, _causal in (
    (HeadwiseMlaConfig, HeadwiseMlaModel, HeadwiseMlaForCausalLM),
    (DeepseekV2MhaConfig, DeepseekV2MhaModel, DeepseekV2MhaForCausalLM),
    (DeepseekV3MhaConfig, DeepseekV3MhaModel, DeepseekV3MhaForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
register_weights()
register()
refuse_name()
