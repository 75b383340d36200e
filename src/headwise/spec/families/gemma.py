"""Gemma 2, and the text parts of Gemma 3 and 3n: local and global layers, scales of their own."""

from typing import Any

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.prefix import bidirectional, has_prefix
from headwise.spec.config.sharing import share_keys
from headwise.spec.config.stacks import grouped_stack, nth_full

_GEMMA2: dict[str, object] = {
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_GEMMA3 = _GEMMA2 | {
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_GEMMA3N: dict[str, object] = {
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "layer_types": None,
    "num_kv_shared_layers": 15,
}


def _read_gemma2(fields: ConfigFields) -> Layout:
    return _read(fields, fields.optional_positive("sliding_window"), pattern=2)


def _read_gemma3(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    if window is not None and bidirectional(fields):
        # The config counts both sides of a bidirectional window; the mask wants |p - key| < w.
        window = window // 2 + 1
    # Old configs give the period of the global layers instead of layer_types.
    pattern = fields.positive("sliding_window_pattern")
    return _read(fields, window, pattern, qk_norm=True)


def _read_gemma3n(fields: ConfigFields) -> Layout:
    windows = nth_full(fields, 5, fields.optional_positive("sliding_window"))
    layout = grouped_stack(fields, windows, scale=1.0, qk_norm=True)
    return share_keys(layout, fields.whole("num_kv_shared_layers"))


def _read(fields: ConfigFields, window: int | None, pattern: int, qk_norm: bool = False) -> Layout:
    return grouped_stack(
        fields,
        nth_full(fields, pattern, window),
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        causal=not bidirectional(fields),
        prefix=has_prefix(fields),
        softcap=fields.optional_number("attn_logit_softcapping"),
        qk_norm=qk_norm,
    )


# Norms before and after, of attention and of the MLP.
_SANDWICH: Any = {
    "norm": "rms plus one",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}

GEMMA2 = Family(
    model_type="gemma2",
    read=_read_gemma2,
    defaults=_GEMMA2,
    copies=True,
    layer=DecoderLayer(name="Gemma2DecoderLayer", softcap="attn_logit_softcapping", **_SANDWICH),
)
GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    read=_read_gemma3,
    defaults=_GEMMA3,
    copies=True,
    layer=DecoderLayer(
        name="Gemma3DecoderLayer",
        softcap="attn_logit_softcapping",
        head_norms=("q_norm", "k_norm"),
        **_SANDWICH,
    ),
)
GEMMA3 = Composite(model_type="gemma3", text="gemma3_text")
GEMMA3N_TEXT = Family(model_type="gemma3n_text", read=_read_gemma3n, defaults=_GEMMA3N)
GEMMA3N = Composite(model_type="gemma3n", text="gemma3n_text")
