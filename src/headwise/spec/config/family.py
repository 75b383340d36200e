"""Everything that headwise knows about one model_type: how to read it, what its modules do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from headwise.spec.config.decoder_layer import DecoderLayer
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type.

    Args:
        model_type: as configs name it.
        read: makes the layers from the fields.
        defaults: the defaults of Transformers' config class, for every field that `read` uses;
            config.json files leave out what equals them.
        aliases: other names under which a config may give a field.
        in_transformers: whether Transformers has models of it.
        interleaved_rope: whether its rotary pairs lie beside each other, whatever a config says.
        partial_rope: whether a `partial_rotary_factor` leaves a part of each head as it is; most
            modules do not look at it.
        copies: whether `from_pretrained_layer` copies its attention module: no more than
            projections, norms per head, and the same rotation in every layer of a kind.
        layer: its decoder layer, where one operator computes what such layers do.
        per_layer: whether its reader looks at a `per_layer_config`.
        stock_kv_heads: kv heads that Transformers caches where these are more than the spec's.
        ties_head: whether Transformers ties the output head whatever a config says.
        encoder_class: the class that runs the encoder alone, where no Auto class does.
        decoder_class: the class that runs the decoder, where no Auto class does; one
            without a head of most text parts.
        weights: (all, output head) parameters, where no model of Transformers can be counted.
        converts: whether `convert` takes its checkpoints: Llama's layout of weights.
        expands: how `convert` makes MHA of its MLA: of a latent that keys are linear in, or of a
            normalised one.
    """

    model_type: str
    read: Callable[[ConfigFields], Layout]
    defaults: Mapping[str, object]
    aliases: Mapping[str, str] = field(default_factory=dict)
    in_transformers: bool = True
    interleaved_rope: bool = False
    partial_rope: bool = False
    copies: bool = False
    layer: DecoderLayer | None = None
    per_layer: bool = False
    stock_kv_heads: Callable[[ConfigFields], int | None] | None = None
    ties_head: bool = False
    encoder_class: str = "AutoModel"
    decoder_class: str | None = None
    weights: Callable[[ConfigFields], tuple[int, int]] | None = None
    converts: bool = False
    expands: Literal["linear", "normalised"] | None = None


@dataclass(frozen=True, kw_only=True)
class Composite:
    """A multimodal model_type, whose text part is of a family.

    Args:
        model_type: as configs name it.
        text: the model_type that its config class fills in where a config leaves the text part out.
        sets: fields that its config class sets in a text part that leaves them out.
        alone: the text part that its config class makes where a config leaves it out.
        flat: whether published configs give the fields of the text part beside those of the others,
            and not in a part of their own.
        renamed: model_types of published text parts, by which its config class knows others.
    """

    model_type: str
    text: str | None = None
    flat: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, object] = field(default_factory=dict)
    alone: Mapping[str, object] = field(default_factory=dict)
