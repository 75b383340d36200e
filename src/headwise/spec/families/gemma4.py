"""Gemma 4: global layers with heads of another size, and layers that share keys.

A global layer of the larger models has one projection for keys and values
(`attention_k_eq_v`). What is cached are still two rows: the key is rotated, the value is not.
"""

from collections.abc import Mapping
from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.checks import positive_int, shown
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import grouped_heads
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.config.sharing import share_keys
from headwise.spec.config.windows import layer_kinds

_GEMMA4: dict[str, object] = {
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "layer_types": None,
    "use_bidirectional_attention": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
}
_UNIFIED = _GEMMA4 | {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}
_KINDS = ("sliding_attention", "full_attention")
_PATTERN = 6
# What differs between layers, in a config that Transformers has written.
_OWN = ("head_dim", "num_key_value_heads")


def _read(fields: ConfigFields) -> Layout:
    both = fields.raw("use_bidirectional_attention")
    if both not in (None, "vision"):
        raise SpecError(
            f"use_bidirectional_attention={shown(both)}: a model that sees both sides of a text is "
            "not covered; expected null or 'vision'"
        )
    slides, window = _slides(fields), fields.positive("sliding_window")
    local = grouped_heads(fields, scale=1.0, qk_norm=True)
    own = _own_sizes(fields, slides)
    attentions = [
        replace(_with_sizes(local, own.get(index, {})), window=window if slide else None)
        for index, slide in enumerate(slides)
    ]
    layout = one_stack(attentions, fields.positive("max_position_embeddings"))
    return share_keys(layout, fields.whole("num_kv_shared_layers"))


def _slides(fields: ConfigFields) -> list[bool]:
    """Of each layer whether it slides; the last never does, whatever the config says."""
    layers = fields.layers("num_hidden_layers")
    kinds = layer_kinds(fields, layers, known=_KINDS)
    if kinds is None:
        slides = [(index + 1) % _PATTERN != 0 for index in range(layers)]
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    return [*slides[:-1], False]


def _own_sizes(fields: ConfigFields, slides: list[bool]) -> dict[int, Mapping[str, object]]:
    """What differs from the config's own sizes, by layer."""
    given = fields.raw("per_layer_config")
    if given is None:
        sizes: dict[str, object] = {"head_dim": fields.positive("global_head_dim")}
        if fields.flag("attention_k_eq_v"):
            sizes["num_key_value_heads"] = fields.optional_positive("num_global_key_value_heads")
        return {index: sizes for index, slide in enumerate(slides) if not slide}
    if not isinstance(given, Mapping):
        raise SpecError(f"per_layer_config={shown(given)}: expected a dict of layers or null")
    return dict(_entry(key, sizes, len(slides)) for key, sizes in given.items())


def _entry(key: object, sizes: object, layers: int) -> tuple[int, Mapping[str, object]]:
    index = int(key) if isinstance(key, int | str) and str(key).isdecimal() else layers
    if index >= layers or not isinstance(sizes, Mapping) or not set(sizes) <= set(_OWN):
        raise SpecError(
            f"per_layer_config has {shown(key)}: {shown(sizes)}: expected the index of one of "
            f"{layers} layers, and {' and '.join(_OWN)} alone"
        )
    return index, sizes


def _with_sizes(attention: AttentionSpec, sizes: Mapping[str, object]) -> AttentionSpec:
    dim, kv_heads = (sizes.get(name) for name in _OWN)
    if dim is not None:
        dim = positive_int("head_dim", dim)
        attention = replace(attention, head_dim=dim, value_dim=dim)
    if kv_heads is not None:
        attention = replace(attention, kv_heads=positive_int("num_key_value_heads", kv_heads))
    return attention


GEMMA4_TEXT = Family(model_type="gemma4_text", read=_read, defaults=_GEMMA4, per_layer=True)
GEMMA4 = Composite(model_type="gemma4", text="gemma4_text")
GEMMA4_UNIFIED_TEXT = Family(
    model_type="gemma4_unified_text", read=_read, defaults=_UNIFIED, per_layer=True
)
GEMMA4_UNIFIED = Composite(model_type="gemma4_unified", text="gemma4_unified_text")
