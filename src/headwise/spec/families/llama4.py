"""Llama 4: three layers that attend within chunks, then one without rotation that sees all."""

from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.checks import integer, shown
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.config.windows import layer_kinds

_DEFAULTS: dict[str, object] = {
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "use_qk_norm": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "layer_types": None,
}
_KINDS = ("chunked_attention", "full_attention")


def _read(fields: ConfigFields) -> Layout:
    rotated, attention = _rotated(fields), grouped_heads(fields)
    chunk, norm = fields.optional_positive("attention_chunk_size"), fields.flag("use_qk_norm")
    kinds = layer_kinds(fields, len(rotated), known=_KINDS)
    if kinds is None:
        chunked = [turns and chunk is not None for turns in rotated]
    else:
        chunked = [kind == "chunked_attention" for kind in kinds]
    if any(chunked) and chunk is None:
        raise SpecError(
            f"attention_chunk_size is not set while {sum(chunked)} of {len(chunked)} layers attend "
            "in chunks: expected the tokens of a chunk"
        )
    attentions = [
        # queries and keys are normalised after they are rotated, and nowhere else
        replace(attention, window=chunk if cut else None, chunked=cut, qk_norm=norm and turns)
        for cut, turns in zip(chunked, rotated, strict=True)
    ]
    return one_stack(attentions, fields.positive("max_position_embeddings"))


def _rotated(fields: ConfigFields) -> list[bool]:
    """Of each layer whether it has rotary positions: 1 in `no_rope_layers`, despite the name."""
    layers, given = fields.layers("num_hidden_layers"), fields.raw("no_rope_layers")
    if given is None or given == []:
        interval = fields.positive("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(given, list | tuple) or len(given) != layers:
        raise SpecError(
            f"no_rope_layers={shown(given)}: expected 1 or 0 for each of the "
            f"num_hidden_layers={layers} layers"
        )
    return [integer("no_rope_layers", each, least=0) != 0 for each in given]


LLAMA4_TEXT = Family(
    model_type="llama4_text", read=_read, defaults=_DEFAULTS, interleaved_rope=True
)
LLAMA4 = Composite(model_type="llama4", text="llama4_text")
