"""T5: an encoder and a decoder with cross-attention, unscaled scores, relative position bias."""

from headwise.spec.attention import AttentionSpec
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads
from headwise.spec.config.layout import Layout
from headwise.spec.layer import LayerSpec

_DEFAULTS: dict[str, object] = {
    "d_kv": 64,
    "num_heads": 8,
    "num_layers": 6,
    "num_decoder_layers": None,
    "is_encoder_decoder": True,
}


def _read(fields: ConfigFields) -> Layout:
    heads, head_dim = fields.positive("num_heads"), fields.positive("d_kv")
    layers = fields.layers("num_layers")
    alone = fields.raw("num_decoder_layers") is None
    decoder_layers = layers if alone else fields.layers("num_decoder_layers")

    def attention(*, causal: bool, cross: bool = False) -> AttentionSpec:
        # T5 puts 1/sqrt(D) into its initialisation and multiplies scores by nothing
        # (https://arxiv.org/abs/1910.10683); its cross-attention adds a bias of zeros.
        return equal_heads(
            heads, head_dim, scale=1.0, causal=causal, cross=cross, relative_bias=not cross
        )

    encoder = tuple(LayerSpec(index, attention(causal=False)) for index in range(layers))
    decoder: tuple[LayerSpec, ...] = ()
    # T5EncoderModel clears this flag in the config that it is built from.
    if fields.flag("is_encoder_decoder"):
        decoder = tuple(
            LayerSpec(index, attention(causal=True), attention(causal=False, cross=True))
            for index in range(decoder_layers)
        )
    # Relative positions beyond the last bucket share it, so no length is too long.
    return Layout(decoder, encoder, None)


T5 = Family(
    model_type="t5",
    read=_read,
    defaults=_DEFAULTS,
    ties_head=True,
    encoder_class="T5EncoderModel",
    aliases={
        "head_dim": "d_kv",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
)
