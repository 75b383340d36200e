"""Attention layers and whole models as data, read from any Hugging Face config."""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.indexer_spec import IndexerSpec
from headwise.spec.layer_spec import LayerSpec
from headwise.spec.model_spec import ModelSpec
from headwise.spec.state_spec import StateSpec

__all__ = ["AttentionSpec", "IndexerSpec", "LayerSpec", "ModelSpec", "StateSpec"]
