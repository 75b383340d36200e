"""The text parts of vision-language models that have one of their own: Qwen-VL, Kimi K2.5.

Their rotary positions count the axes of an image; what is cached does not differ from a text's.
"""

from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import grouped_stack, read_normalised
from headwise.spec.config.windows import layer_windows

_QWEN2_VL: dict[str, object] = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
    "layer_types": None,
}
_QWEN3_VL: dict[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
}
_QWEN3_VL_MOE: dict[str, object] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "max_position_embeddings": 128000,
}


def _read_qwen2_vl(fields: ConfigFields) -> Layout:
    used = fields.optional_flag("use_sliding_window")
    window = fields.optional_positive("sliding_window") if used else None
    layers = fields.layers("num_hidden_layers")
    first = 0 if window is None else fields.whole("max_window_layers")
    slides = [window is not None and index >= first for index in range(layers)]
    # rounded down, and a head_dim is not looked at
    head_dim = max(1, fields.positive("hidden_size") // fields.positive("num_attention_heads"))
    windows = layer_windows(fields, window, default=slides)
    return grouped_stack(fields, windows, head_dim=head_dim)


QWEN2_VL_TEXT = Family(
    model_type="qwen2_vl_text",
    read=_read_qwen2_vl,
    defaults=_QWEN2_VL,
    decoder_class="Qwen2VLTextModel",
)
QWEN2_VL = Composite(model_type="qwen2_vl", text="qwen2_vl_text", flat=True)
QWEN2_5_VL_TEXT = Family(
    model_type="qwen2_5_vl_text",
    read=_read_qwen2_vl,
    defaults=_QWEN2_VL,
    decoder_class="Qwen2_5_VLTextModel",
)
QWEN2_5_VL = Composite(model_type="qwen2_5_vl", text="qwen2_5_vl_text", flat=True)
QWEN3_VL_TEXT = Family(
    model_type="qwen3_vl_text",
    read=read_normalised,
    defaults=_QWEN3_VL,
    decoder_class="Qwen3VLTextModel",
)
QWEN3_VL = Composite(model_type="qwen3_vl", text="qwen3_vl_text")
QWEN3_VL_MOE_TEXT = Family(
    model_type="qwen3_vl_moe_text",
    read=read_normalised,
    defaults=_QWEN3_VL_MOE,
    decoder_class="Qwen3VLMoeTextModel",
)
QWEN3_VL_MOE = Composite(model_type="qwen3_vl_moe", text="qwen3_vl_moe_text")
KIMI_K25 = Composite(model_type="kimi_k25", text="deepseek_v3", renamed={"kimi_k2": "deepseek_v3"})
