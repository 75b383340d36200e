"""MPT: MHA with ALiBi, whose score factor may be a field."""

from collections.abc import Mapping

from headwise.errors import SpecError
from headwise.spec.checks import finite, shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads, split_hidden
from headwise.spec.config.layout import Layout, one_stack


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("n_heads"), split_hidden(fields, "d_model", "n_heads")
    attention = equal_heads(heads, head_dim, scale=_scale(fields), alibi=True)
    # ALiBi's bias is made for so many positions, and for no more.
    return one_stack([attention] * fields.layers("n_layers"), fields.positive("max_seq_len"))


def _scale(fields: ConfigFields) -> float | None:
    inner = fields.raw("attn_config")
    if inner is None:
        return None
    if not isinstance(inner, Mapping):
        raise SpecError(f"attn_config={shown(inner)}: expected a dict of settings, or null")
    kind = inner.get("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        raise SpecError(
            f"attn_config.attn_type={shown(kind)}: Transformers builds multi-head attention "
            "whatever this says; expected 'multihead_attention'"
        )
    scale = inner.get("softmax_scale")
    return None if scale is None else finite("attn_config.softmax_scale", scale)


MPT = Family(
    model_type="mpt",
    read=_read,
    defaults={
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "max_seq_len": 2048,
        "attn_config": None,
    },
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
)
