"""Attention layers and whole models as data, read from any Hugging Face config."""

from headwise.spec.attention import AttentionSpec
from headwise.spec.cache_rows import CacheRows
from headwise.spec.config.family import Composite, Family
from headwise.spec.families import FAMILIES, config_fields, family_of
from headwise.spec.indexer import IndexerSpec
from headwise.spec.layer import LayerSpec, Mixer
from headwise.spec.model import ModelSpec
from headwise.spec.sparse import SparseChoice
from headwise.spec.state import StateSpec
from headwise.spec.uncovered import Uncovered

__all__ = [
    "FAMILIES",
    "AttentionSpec",
    "CacheRows",
    "Composite",
    "Family",
    "IndexerSpec",
    "LayerSpec",
    "Mixer",
    "ModelSpec",
    "SparseChoice",
    "StateSpec",
    "Uncovered",
    "config_fields",
    "family_of",
]
