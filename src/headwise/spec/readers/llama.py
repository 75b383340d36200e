"""Llama, Mistral, Mixtral, Gemma, GLM, Phi-3, Qwen2, Qwen3: kv heads in groups.

Some have windows or QK-norm.
"""

from collections.abc import Sequence

from headwise.spec.attention_spec import AttentionSpec
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.heads import key_value_heads, split_hidden
from headwise.spec.readers.layout import Layout, one_stack
from headwise.spec.readers.prefix import bidirectional, has_prefix
from headwise.spec.readers.windows import layer_windows

_LLAMA: dict[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {"sliding_window": None}
_GEMMA = _LLAMA | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "use_bidirectional_attention": None,
}
_GLM = _LLAMA | {
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
_PHI3 = _LLAMA | {
    "hidden_size": 3072,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
_QWEN2 = _LLAMA | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}
_QWEN3_MOE = _LLAMA | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def _read_llama(fields: ConfigFields) -> Layout:
    return _read(fields, [None] * fields.layers("num_hidden_layers"))


def _read_mistral(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    return _read(fields, [window] * fields.layers("num_hidden_layers"))


def _read_gemma(fields: ConfigFields) -> Layout:
    windows: list[int | None] = [None] * fields.layers("num_hidden_layers")
    return _read(fields, windows, causal=not bidirectional(fields), prefix=has_prefix(fields))


def _read_qwen2(fields: ConfigFields) -> Layout:
    return _read(fields, _qwen_windows(fields))


def _read_qwen3(fields: ConfigFields) -> Layout:
    return _read(fields, _qwen_windows(fields), qk_norm=True)


def _read_qwen3_moe(fields: ConfigFields) -> Layout:
    # Without layer_types, the window holds in every layer.
    used = fields.flag("use_sliding_window")
    window = fields.optional_positive("sliding_window") if used else None
    return _read(fields, [window] * fields.layers("num_hidden_layers"), qk_norm=True)


def _qwen_windows(fields: ConfigFields) -> list[int | None]:
    # Published Qwen2 configs carry a sliding_window that use_sliding_window=false switches off.
    used = fields.flag("use_sliding_window")
    window = fields.optional_positive("sliding_window") if used else None
    layers, first = fields.layers("num_hidden_layers"), fields.whole("max_window_layers")
    slides = [window is not None and index >= first for index in range(layers)]
    return layer_windows(fields, window, default=slides)


def _read(
    fields: ConfigFields,
    windows: Sequence[int | None],
    *,
    qk_norm: bool = False,
    causal: bool = True,
    prefix: bool = False,
) -> Layout:
    heads = fields.positive("num_attention_heads")
    head_dim = fields.optional_positive("head_dim") or split_hidden(fields)
    kv_heads = key_value_heads(fields, heads)
    attentions = [
        AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            causal=causal,
            prefix=prefix,
            window=window,
            qk_norm=qk_norm,
        )
        for window in windows
    ]
    return one_stack(attentions, fields.positive("max_position_embeddings"))


LLAMA = Family(_read_llama, _LLAMA)
MISTRAL = Family(_read_mistral, _MISTRAL)
MIXTRAL = Family(_read_mistral, _MIXTRAL)
GEMMA = Family(_read_gemma, _GEMMA)
GLM = Family(_read_llama, _GLM)
PHI3 = Family(_read_mistral, _PHI3)
QWEN2 = Family(_read_qwen2, _QWEN2)
QWEN3 = Family(_read_qwen3, _QWEN3)
QWEN3_MOE = Family(_read_qwen3_moe, _QWEN3_MOE)
