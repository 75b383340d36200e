"""Whisper: an encoder over audio, and a decoder with cross-attention to what it gives."""

from headwise.spec.attention import AttentionSpec
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads, split_hidden
from headwise.spec.config.layout import Layout
from headwise.spec.layer import LayerSpec

_DEFAULTS: dict[str, object] = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "max_target_positions": 448,
}


def _read(fields: ConfigFields) -> Layout:
    def attention(part: str, *, causal: bool, cross: bool = False) -> AttentionSpec:
        heads = f"{part}_attention_heads"
        head_dim = split_hidden(fields, "d_model", heads)
        return equal_heads(fields.positive(heads), head_dim, causal=causal, cross=cross)

    encoder = attention("encoder", causal=False)
    own = attention("decoder", causal=True)
    cross = attention("decoder", causal=False, cross=True)
    return Layout(
        tuple(LayerSpec(index, own, cross) for index in range(fields.layers("decoder_layers"))),
        tuple(LayerSpec(index, encoder) for index in range(fields.layers("encoder_layers"))),
        # of the text; the audio is always 30 seconds
        fields.positive("max_target_positions"),
    )


WHISPER = Family(
    model_type="whisper",
    read=_read,
    defaults=_DEFAULTS,
    decoder_class="WhisperForConditionalGeneration",
    aliases={
        "num_key_value_heads": "encoder_attention_heads",
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    },
)
