"""Qwen2-MoE and MiniMax-M2: grouped kv heads beside a mixture of experts."""

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import grouped_stack, read_normalised
from headwise.spec.config.windows import layer_windows, used_window

_QWEN2_MOE: dict[str, object] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_MINIMAX_M2: dict[str, object] = {
    "hidden_size": 3072,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
}


def _read_qwen2_moe(fields: ConfigFields) -> Layout:
    window = used_window(fields)
    layers, last = fields.layers("num_hidden_layers"), fields.whole("max_window_layers")
    # every other one of the first layers, where Qwen2 has the window in its last
    slides = [window is not None and index % 2 == 0 and index < last for index in range(layers)]
    return grouped_stack(fields, layer_windows(fields, window, default=slides))


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    read=_read_qwen2_moe,
    defaults=_QWEN2_MOE,
    layer=DecoderLayer(name="Qwen2MoeDecoderLayer", window=False),
)
MINIMAX_M2 = Family(
    model_type="minimax_m2",
    read=read_normalised,
    defaults=_MINIMAX_M2,
    partial_rope=True,
    layer=DecoderLayer(name="MiniMaxM2DecoderLayer", head_norms=("q_norm", "k_norm")),
)
