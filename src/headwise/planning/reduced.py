"""A model with the attention of the planned one and a small rest: enough to check it with."""

from collections.abc import Iterator
from typing import Any

from headwise.errors import HeadwiseError
from headwise.planning.model import PlannedModel
from headwise.planning.stock_model import transformers_config
from headwise.spec import ModelSpec

# Sizes for what decides neither the attention nor its cache.
_SMALL = {
    512: ("vocab_size", "vocab_size_per_layer_input"),
    64: ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "ffn_dim"),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size"),
        "shared_intermediate_size",
    ),
    8: ("hidden_size_per_layer_input",),
    4: ("num_local_experts", "num_experts", "n_routed_experts"),
    2: ("num_experts_per_tok", "top_k_experts"),
    1: ("n_group", "topk_group"),
    0: ("pad_token_id", "bos_token_id", "decoder_start_token_id"),
}
_PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern"),
    "no_rope_layers",
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"),  # one number in most families
)
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)


def reduced(model: PlannedModel) -> PlannedModel:
    """The model with few layers, at least one of each kind, and small where attention is not.

    >>> from headwise.planning.model import find_model
    >>> str(reduced(find_model("gpt-oss-20b")).spec)
    'gpt_oss, context up to 131072: 1 x GQA 64/8 heads, D 64, window 128, sinks + 1 x GQA ...'
    """
    wanted = _kinds(model.spec)
    config = next(each for each in _narrower(model) if _kinds_of(each) == wanted)
    depth = max(len(model.spec.layers), len(model.spec.encoder_layers))
    for layers in range(1, depth):
        fewer = _with_depth(config, layers)
        if _kinds_of(fewer) == wanted:
            return PlannedModel(model.name, ModelSpec.from_config(fewer), fewer)
    return PlannedModel(model.name, ModelSpec.from_config(config), config)


def _narrower(model: PlannedModel) -> Iterator[dict[str, Any]]:
    """With a small hidden size, where the heads' size is given beside it; then with its own."""
    config, known = _without_size(model), transformers_config(model)
    layers = (*model.spec.layers, *model.spec.encoder_layers)
    attention = next(layer.attention for layer in layers if layer.attention)
    small: dict[str, Any] = {
        name: 8 * attention.heads for name in ("hidden_size", "d_model") if name in config
    }
    # not hasattr: a config whose layers differ in it raises
    if "head_dim" in {*vars(known), *known.attribute_map} and attention.mechanism != "MLA":
        yield {**config, **small, "head_dim": attention.head_dim}
    yield {**config, **small}
    yield config


def _without_size(model: PlannedModel) -> dict[str, Any]:
    # All fields, so that those which Transformers has under another name are seen too.
    known = transformers_config(model)
    changes: dict[str, Any] = {
        name: size for size, names in _SMALL.items() for name in names if hasattr(known, name)
    }
    if hasattr(known, "eos_token_id"):
        changes["eos_token_id"] = None
    config = {**model.config, **changes}
    # A list for each layer, where it is one number otherwise.
    config.pop("activation_sparsity_pattern", None)
    return config


def _with_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    fewer = dict(config)
    for name in _DEPTHS:
        if fewer.get(name) is not None:
            fewer[name] = layers
    for name in _PER_LAYER:
        if isinstance(fewer.get(name), list | tuple | str):
            fewer[name] = fewer[name][:layers]
    return fewer


def _kinds_of(config: dict[str, Any]) -> set[tuple[Any, ...]] | None:
    """Those of a config; None where the smaller sizes contradict one another."""
    try:
        return _kinds(ModelSpec.from_config(config))
    except HeadwiseError:
        return None


def _kinds(spec: ModelSpec) -> set[tuple[Any, ...]]:
    layers = (*spec.layers, *spec.encoder_layers)
    return {(layer.mixer, layer.cross_attention, layer.shares is not None) for layer in layers}
