"""OLMo, OLMo 2, OLMo 3 and OLMoE: MHA or GQA, from OLMo 2 on with normalised queries and keys."""

from typing import Any

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import (
    LLAMA_DEFAULTS,
    grouped_stack,
    nth_full,
    read_full,
    read_normalised,
)

_OLMO3 = LLAMA_DEFAULTS | {"sliding_window": 4096, "layer_types": None}
_OLMOE = LLAMA_DEFAULTS | {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
}


_NORMS_BEHIND: Any = {
    "norm": "rms wide",
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_mlp": None,
    "after_mlp": "post_feedforward_layernorm",
    "head_norms": ("q_norm", "k_norm"),
}


def _read_olmo3(fields: ConfigFields) -> Layout:
    windows = nth_full(fields, 4, fields.optional_positive("sliding_window"))
    return grouped_stack(fields, windows, qk_norm=True)


OLMO = Family(model_type="olmo", read=read_full, defaults=LLAMA_DEFAULTS)
OLMO2 = Family(
    model_type="olmo2",
    read=read_normalised,
    defaults=LLAMA_DEFAULTS,
    layer=DecoderLayer(name="Olmo2DecoderLayer", **_NORMS_BEHIND),
)
OLMO3 = Family(
    model_type="olmo3",
    read=_read_olmo3,
    defaults=_OLMO3,
    layer=DecoderLayer(name="Olmo3DecoderLayer", **_NORMS_BEHIND),
)
OLMOE = Family(model_type="olmoe", read=read_normalised, defaults=_OLMOE)
