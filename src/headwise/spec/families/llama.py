"""Llama, Mistral, Mixtral, Gemma, Phi-3, Qwen2, Qwen3: kv heads in groups.

Some have windows or QK-norm.
"""

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.prefix import bidirectional, has_prefix
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack, read_full, read_window
from headwise.spec.config.windows import layer_windows, used_window

_MISTRAL = LLAMA_DEFAULTS | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {"sliding_window": None}
_GEMMA = LLAMA_DEFAULTS | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "use_bidirectional_attention": None,
}
_PHI3 = LLAMA_DEFAULTS | {
    "hidden_size": 3072,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
_QWEN2 = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}
_QWEN3_MOE = LLAMA_DEFAULTS | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def _read_gemma(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, causal=not bidirectional(fields), prefix=has_prefix(fields))


def _read_qwen2(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, _qwen_windows(fields))


def _read_qwen3(fields: ConfigFields) -> Layout:
    return grouped_stack(fields, _qwen_windows(fields), qk_norm=True)


def _read_qwen3_moe(fields: ConfigFields) -> Layout:
    # Without layer_types, the window holds in every layer.
    windows = [used_window(fields)] * fields.layers("num_hidden_layers")
    return grouped_stack(fields, windows, qk_norm=True)


def _qwen_windows(fields: ConfigFields) -> list[int | None]:
    window = used_window(fields)
    layers, first = fields.layers("num_hidden_layers"), fields.whole("max_window_layers")
    slides = [window is not None and index >= first for index in range(layers)]
    return layer_windows(fields, window, default=slides)


_HEAD_NORMS = ("q_norm", "k_norm")

LLAMA = Family(
    model_type="llama",
    read=read_full,
    defaults=LLAMA_DEFAULTS,
    converts=True,
    copies=True,
    layer=DecoderLayer(name="LlamaDecoderLayer"),
)
MISTRAL = Family(
    model_type="mistral",
    read=read_window,
    defaults=_MISTRAL,
    converts=True,
    copies=True,
    layer=DecoderLayer(name="MistralDecoderLayer"),
)
MIXTRAL = Family(
    model_type="mixtral",
    read=read_window,
    defaults=_MIXTRAL,
    copies=True,
    layer=DecoderLayer(name="MixtralDecoderLayer"),
)
GEMMA = Family(
    model_type="gemma",
    read=_read_gemma,
    defaults=_GEMMA,
    layer=DecoderLayer(name="GemmaDecoderLayer", norm="rms plus one"),
)
PALIGEMMA = Composite(model_type="paligemma", sets={"use_bidirectional_attention": True})
PHI3 = Family(
    model_type="phi3",
    read=read_window,
    defaults=_PHI3,
    partial_rope=True,
    layer=DecoderLayer(
        name="Phi3DecoderLayer",
        qkv=("qkv_proj",),
        gate="gate_up_proj",
        up="gate_up_proj",
        activation="activation_fn",
    ),
)
QWEN2 = Family(
    model_type="qwen2",
    read=_read_qwen2,
    defaults=_QWEN2,
    converts=True,
    copies=True,
    layer=DecoderLayer(name="Qwen2DecoderLayer"),
)
QWEN3 = Family(
    model_type="qwen3",
    read=_read_qwen3,
    defaults=_QWEN3,
    copies=True,
    layer=DecoderLayer(name="Qwen3DecoderLayer", head_norms=_HEAD_NORMS),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    read=_read_qwen3_moe,
    defaults=_QWEN3_MOE,
    copies=True,
    layer=DecoderLayer(name="Qwen3MoeDecoderLayer", head_norms=_HEAD_NORMS),
)
