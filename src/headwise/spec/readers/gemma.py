"""Gemma 2, and the text parts of Gemma 3 and 3n: local and global layers, scales of their own."""

from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.heads import key_value_heads
from headwise.spec.readers.layout import Layout, one_stack
from headwise.spec.readers.prefix import bidirectional, has_prefix
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
    heads, head_dim = fields.positive("num_attention_heads"), fields.positive("head_dim")
    kv_heads = key_value_heads(fields, heads)
    layers = fields.layers("num_hidden_layers")
    windows = layer_windows(
        fields,
        fields.optional_positive("sliding_window"),
        default=[(index + 1) % 5 != 0 for index in range(layers)],
    )
    attentions = [
        AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=1.0,
            window=window,
            qk_norm=True,
        )
        for window in windows
    ]
    layout = one_stack(attentions, fields.positive("max_position_embeddings"))
    own = max(0, layers - fields.whole("num_kv_shared_layers"))
    # The last layers have no keys of their own: each reads those of the last one of its kind.
    shared = tuple(
        replace(layer, shares=_last_of_kind(windows[:own], windows[layer.index], layer.index))
        for layer in layout.layers[own:]
    )
    return layout._replace(layers=layout.layers[:own] + shared)


def _last_of_kind(windows: list[int | None], window: int | None, index: int) -> int:
    if window not in windows:
        raise SpecError(
            f"num_kv_shared_layers: layer {index} (window {window}) shares keys and values, and no "
            "earlier layer of its kind has any; lower num_kv_shared_layers"
        )
    return len(windows) - 1 - windows[::-1].index(window)


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
            causal=not bidirectional(fields),
            prefix=has_prefix(fields),
            window=layer_window,
            softcap=fields.optional_number("attn_logit_softcapping"),
            qk_norm=qk_norm,
        )
        for layer_window in layer_windows(fields, window, default=slides)
    ]
    return one_stack(attentions, fields.positive("max_position_embeddings"))


GEMMA2 = Family(_read_gemma2, _GEMMA2)
GEMMA3_TEXT = Family(_read_gemma3, _GEMMA3)
GEMMA3N_TEXT = Family(_read_gemma3n, _GEMMA3N)
