"""Attention layers and whole models as data, read from any Hugging Face config."""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.layer_spec import LayerSpec
from headwise.spec.model_spec import ModelSpec

__all__ = ["AttentionSpec", "LayerSpec", "ModelSpec"]
