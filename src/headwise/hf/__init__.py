"""headwise inside Hugging Face Transformers. Importing this package imports Transformers.

It also makes our own model type, `headwise_mla`, known to Transformers' Auto classes, so that a
converted checkpoint loads as any other and needs no code of its own.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from headwise.hf.attach import attach, detach
from headwise.hf.cache import (
    ContiguousLayer,
    SinksLayer,
    ViewLayer,
    WindowLayer,
    cache_nbytes,
    use_own_layers,
)
from headwise.hf.mla_config import HeadwiseMlaConfig
from headwise.hf.mla_model import HeadwiseMlaForCausalLM, HeadwiseMlaModel
from headwise.hf.report import AttachReport, LayerReport

__all__ = [
    "AttachReport",
    "ContiguousLayer",
    "HeadwiseMlaConfig",
    "HeadwiseMlaForCausalLM",
    "LayerReport",
    "SinksLayer",
    "ViewLayer",
    "WindowLayer",
    "attach",
    "cache_nbytes",
    "detach",
    "use_own_layers",
]

AutoConfig.register(HeadwiseMlaConfig.model_type, HeadwiseMlaConfig, exist_ok=True)
AutoModel.register(HeadwiseMlaConfig, HeadwiseMlaModel, exist_ok=True)
AutoModelForCausalLM.register(HeadwiseMlaConfig, HeadwiseMlaForCausalLM, exist_ok=True)
