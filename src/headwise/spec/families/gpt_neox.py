"""GPT-NeoX (Pythia) and OPT: MHA, the heads share the hidden size."""

from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads, split_hidden
from headwise.spec.config.layout import Layout, one_stack

_OPT: dict[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}
_NEOX = _OPT | {"hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64}


def _read(fields: ConfigFields) -> Layout:
    attention = equal_heads(fields.positive("num_attention_heads"), split_hidden(fields))
    layers = fields.layers("num_hidden_layers")
    return one_stack([attention] * layers, fields.positive("max_position_embeddings"))


GPT_NEOX = Family(model_type="gpt_neox", read=_read, defaults=_NEOX, partial_rope=True)
OPT = Family(model_type="opt", read=_read, defaults=_OPT)
