"""Gemma 2 and the text part of Gemma 3: local and global layers, their own scale, softcap."""

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.heads import key_value_heads
from headwise.spec.readers.layout import Layout, one_stack
from headwise.spec.readers.windows import layer_windows

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


def _read_gemma2(fields: ConfigFields) -> Layout:
    return _read(fields, fields.optional_positive("sliding_window"), pattern=2)


def _read_gemma3(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    if window is not None and fields.optional_flag("use_bidirectional_attention"):
        # The config counts both sides of a bidirectional window; the mask wants |p - key| < w.
        window = window // 2 + 1
    # Old configs give the period of the global layers instead of layer_types.
    pattern = fields.positive("sliding_window_pattern")
    return _read(fields, window, pattern, qk_norm=True)


def _read(fields: ConfigFields, window: int | None, pattern: int, qk_norm: bool = False) -> Layout:
    heads, head_dim = fields.positive("num_attention_heads"), fields.positive("head_dim")
    kv_heads = key_value_heads(fields, heads)
    slides = [(index + 1) % pattern != 0 for index in range(fields.layers("num_hidden_layers"))]
    attentions = [
        AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=fields.number("query_pre_attn_scalar") ** -0.5,
            causal=not fields.optional_flag("use_bidirectional_attention"),
            window=layer_window,
            softcap=fields.optional_number("attn_logit_softcapping"),
            qk_norm=qk_norm,
        )
        for layer_window in layer_windows(fields, window, default=slides)
    ]
    return one_stack(attentions, fields.positive("max_position_embeddings"))


GEMMA2 = Family(_read_gemma2, _GEMMA2)
GEMMA3_TEXT = Family(_read_gemma3, _GEMMA3)
