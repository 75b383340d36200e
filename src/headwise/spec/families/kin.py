"""Apertus, Arcee, ERNIE 4.5, Hunyuan, Seed-OSS, SmolLM3, StarCoder2: Llama with a difference."""

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import (
    LLAMA_DEFAULTS,
    grouped_stack,
    read_full,
    read_normalised,
    read_window,
)
from headwise.spec.config.windows import layer_windows, used_window

_APERTUS = LLAMA_DEFAULTS | {"max_position_embeddings": 65536}
_ARCEE = LLAMA_DEFAULTS | {"hidden_size": 2560, "max_position_embeddings": 4096}
_ERNIE = LLAMA_DEFAULTS | {
    "hidden_size": 1024,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
_ERNIE_MOE = LLAMA_DEFAULTS | {
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
_SEED_OSS = LLAMA_DEFAULTS | {
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
}
_SMOLLM3 = LLAMA_DEFAULTS | {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
}
_STARCODER2 = LLAMA_DEFAULTS | {
    "hidden_size": 3072,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}


def _read_smollm3(fields: ConfigFields) -> Layout:
    """Windows, where they are used, are those of the layers that do not rotate their keys."""
    window, layers = used_window(fields), fields.layers("num_hidden_layers")
    slides = [False] * layers
    if window is not None and fields.raw("layer_types") is None:
        slides = [not rotates for rotates in _rotates(fields, layers)]
    return grouped_stack(fields, layer_windows(fields, window, default=slides))


def _rotates(fields: ConfigFields, layers: int) -> list[bool]:
    flags = fields.raw("no_rope_layers")
    if flags is None:
        interval = fields.positive("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(flags, list | tuple) or len(flags) < layers:
        raise SpecError(
            f"no_rope_layers={shown(flags)}: expected a list of 0 and 1, one for each of the "
            f"num_hidden_layers={layers} layers"
        )
    return [bool(flag) for flag in flags[:layers]]


APERTUS = Family(model_type="apertus", read=read_normalised, defaults=_APERTUS)
ARCEE = Family(
    model_type="arcee",
    read=read_full,
    defaults=_ARCEE,
    layer=DecoderLayer(name="ArceeDecoderLayer", gate=None),
)
ERNIE4_5 = Family(
    model_type="ernie4_5",
    read=read_full,
    defaults=_ERNIE,
    interleaved_rope=True,
    layer=DecoderLayer(name="Ernie4_5DecoderLayer", rotation="neighbours"),
)
ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    read=read_full,
    defaults=_ERNIE_MOE,
    interleaved_rope=True,
    layer=DecoderLayer(name="Ernie4_5_MoeDecoderLayer", rotation="neighbours"),
)
HUNYUAN_V1_DENSE = Family(
    model_type="hunyuan_v1_dense", read=read_normalised, defaults=LLAMA_DEFAULTS
)
HUNYUAN_V1_MOE = Family(model_type="hunyuan_v1_moe", read=read_normalised, defaults=LLAMA_DEFAULTS)
SEED_OSS = Family(
    model_type="seed_oss",
    read=read_full,
    defaults=_SEED_OSS,
    layer=DecoderLayer(name="SeedOssDecoderLayer"),
)
SMOLLM3 = Family(
    model_type="smollm3",
    read=_read_smollm3,
    defaults=_SMOLLM3,
    layer=DecoderLayer(name="SmolLM3DecoderLayer", rotates="use_rope"),
)
STARCODER2 = Family(
    model_type="starcoder2",
    read=read_window,
    defaults=_STARCODER2,
    layer=DecoderLayer(
        name="Starcoder2DecoderLayer",
        norm="layer",
        gate=None,
        up="c_fc",
        down="c_proj",
        activation="act",
    ),
)
