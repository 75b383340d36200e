"""OLMo, OLMo 2, OLMo 3 and OLMoE: MHA or GQA, from OLMo 2 on with normalised queries and keys."""

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


def _read_olmo3(fields: ConfigFields) -> Layout:
    windows = nth_full(fields, 4, fields.optional_positive("sliding_window"))
    return grouped_stack(fields, windows, qk_norm=True)


OLMO = Family(model_type="olmo", read=read_full, defaults=LLAMA_DEFAULTS)
OLMO2 = Family(model_type="olmo2", read=read_normalised, defaults=LLAMA_DEFAULTS)
OLMO3 = Family(model_type="olmo3", read=_read_olmo3, defaults=_OLMO3)
OLMOE = Family(model_type="olmoe", read=read_normalised, defaults=_OLMOE)
