"""Llama, Mistral, Mixtral, Gemma, GLM, Phi-3, Qwen2, Qwen3: kv heads in groups.

Some have windows or QK-norm.
"""

from collections.abc import Sequence

from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads, with_windows
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.config.prefix import bidirectional, has_prefix
from headwise.spec.config.windows import layer_windows

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
    return _stack(fields, [None] * fields.layers("num_hidden_layers"))


def _read_mistral(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    return _stack(fields, [window] * fields.layers("num_hidden_layers"))


def _read_gemma(fields: ConfigFields) -> Layout:
    windows: list[int | None] = [None] * fields.layers("num_hidden_layers")
    return _stack(fields, windows, causal=not bidirectional(fields), prefix=has_prefix(fields))


def _read_qwen2(fields: ConfigFields) -> Layout:
    return _stack(fields, _qwen_windows(fields))


def _read_qwen3(fields: ConfigFields) -> Layout:
    return _stack(fields, _qwen_windows(fields), qk_norm=True)


def _read_qwen3_moe(fields: ConfigFields) -> Layout:
    # Without layer_types, the window holds in every layer.
    windows = [_qwen_window(fields)] * fields.layers("num_hidden_layers")
    return _stack(fields, windows, qk_norm=True)


def _qwen_windows(fields: ConfigFields) -> list[int | None]:
    window = _qwen_window(fields)
    layers, first = fields.layers("num_hidden_layers"), fields.whole("max_window_layers")
    slides = [window is not None and index >= first for index in range(layers)]
    return layer_windows(fields, window, default=slides)


def _qwen_window(fields: ConfigFields) -> int | None:
    # Published Qwen2 configs carry a sliding_window that use_sliding_window=false switches off.
    used = fields.flag("use_sliding_window")
    return fields.optional_positive("sliding_window") if used else None


def _stack(fields: ConfigFields, windows: Sequence[int | None], **options: bool) -> Layout:
    attentions = with_windows(grouped_heads(fields, **options), windows)
    return one_stack(attentions, fields.positive("max_position_embeddings"))


LLAMA = Family(model_type="llama", read=_read_llama, defaults=_LLAMA, converts=True)
MISTRAL = Family(
    model_type="mistral",
    read=_read_mistral,
    defaults=_MISTRAL,
    converts=True,
)
MIXTRAL = Family(model_type="mixtral", read=_read_mistral, defaults=_MIXTRAL)
GEMMA = Family(model_type="gemma", read=_read_gemma, defaults=_GEMMA)
PALIGEMMA = Composite(model_type="paligemma", sets={"use_bidirectional_attention": True})
GLM = Family(model_type="glm", read=_read_llama, defaults=_GLM)
PHI3 = Family(model_type="phi3", read=_read_mistral, defaults=_PHI3)
QWEN2 = Family(model_type="qwen2", read=_read_qwen2, defaults=_QWEN2, converts=True)
QWEN3 = Family(model_type="qwen3", read=_read_qwen3, defaults=_QWEN3)
QWEN3_MOE = Family(model_type="qwen3_moe", read=_read_qwen3_moe, defaults=_QWEN3_MOE)
