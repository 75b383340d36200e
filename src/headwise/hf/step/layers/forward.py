"""What stands in for the `forward` of a decoder layer: two operators, with the cache between."""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.caches import ContiguousCache, DiskCache, PagedCache
from headwise.hf.cache_layers import OwnLayer
from headwise.hf.interface import headwise_attention_forward
from headwise.hf.module_hook import NAME, ModuleHook, is_touched
from headwise.hf.observer import current_observer
from headwise.hf.own_cache import CACHE_ARGUMENTS, OwnCache
from headwise.hf.step.codes import ROTATIONS
from headwise.hf.step.layers.parts import Arguments, LayerParts
from headwise.hf.stock_names import DynamicCache, _active_collector
from headwise.ops import LayerOffer, are_few, layer_offer, watched
from headwise.spec.config.decoder_layer import DecoderLayer

_SERVED = {"attention_mask", "position_embeddings", *CACHE_ARGUMENTS}
# What a model gives its layers and no attention of these families looks at.
_UNREAD = {"position_ids", "use_cache", "cache_position"}

# What a call may ask to be captured.
_ASKS = {"output_attentions", "output_router_logits"}


def layers_of(model: nn.Module, form: DecoderLayer) -> dict[str, nn.Module]:
    """The layers of Transformers' class that a family's file describes, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == form.name
        and type(module).__module__.startswith("transformers.models.")
    }


class LayerForward(ModuleHook):
    """Stands in for a layer's `forward`: the class's own, but for plain calls of few rows."""

    def __init__(self, owner: nn.Module, form: DecoderLayer) -> None:
        super().__init__(owner)
        self.parts: LayerParts | None = LayerParts(owner, form)

    def __getstate__(self) -> dict[str, Any]:
        owner = super().__getstate__()
        self._now(owner["owner"])  # lets go of what is not the layer's any more
        return {**owner, "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.parts = state["parts"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.owner
        plan = self.plan(layer, args, kwargs)
        if plan is None:
            return type(layer).forward(layer, *args, **kwargs)
        return run(*plan, args[0], kwargs)

    def _now(self, layer: nn.Module) -> tuple[LayerParts, Arguments] | None:
        """The layer's parts and arguments; None, once and for all, where a part is another one."""
        parts = self.parts
        made = None if parts is None else parts.now(layer)
        if parts is not None and parts.gone:
            self.parts = None
        return None if parts is None or made is None else (parts, made)

    def plan(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[LayerParts, Arguments, LayerOffer] | None:
        """What `run` takes of this call; None where the call is stock's."""
        if len(args) != 1 or layer.training or torch.is_grad_enabled() or watched():
            return None
        x = args[0]
        if type(x) is not Tensor or x.ndim != 3 or not are_few(x):
            return None
        now = self._now(layer)
        if now is None:
            return None
        parts, made = now
        if (
            parts.attention.config._attn_implementation != NAME
            or _active_collector.get()  # empty where nothing is asked for
            or current_observer() is not None
            or nn.modules.module._has_any_global_hook()
        ):
            return None
        for name, value in kwargs.items():
            if name in _SERVED or name in _UNREAD or value is None:
                continue
            if name not in _ASKS or value is not False:
                return None
        if not _is_known(_cache(kwargs), parts.attention.layer_idx):
            return None
        if made.angles and not _rotates(x, kwargs.get("position_embeddings"), made.angles):
            return None
        offer = _offer(x, made)
        return None if offer is None else (parts, made, offer)


def _offer(x: Tensor, made: Arguments) -> LayerOffer | None:
    """What runs the layer on x: asked once for each kind of x and place of the weights."""
    places = [tensor.data_ptr() for tensor in made.tensors]
    key = (x.dtype, x.shape, x.device, x.layout, x.is_nested, *places)
    offer: LayerOffer | None = made.offers.get(key)
    if offer is None:
        offer = layer_offer(x, made.tensors)
        if offer is not None:
            made.offers.clear()
            made.offers[key] = offer
    return offer


def run(
    parts: LayerParts, made: Arguments, offer: LayerOffer, x: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """What the layer returns for a call that `LayerForward.plan` took."""
    attention = parts.attention
    rotation: Any = (None, None)
    if made.angles:
        rotation = (part.contiguous() for part in kwargs["position_embeddings"])
    before = (*made.before, *rotation, ROTATIONS[parts.form.rotation])
    cache, mask = _cache(kwargs), kwargs.get("attention_mask")
    plain = mask is None and made.causal
    count, kv_heads = x.shape[1], made.before[7]
    layer = _own_layer(cache, attention) if plain else None
    room = sketch = None
    if layer is not None:
        room = layer.cache.room(x.shape[0], kv_heads, count, x)
        rule = layer.sparse
        if rule is not None and layer.chooses(count, layer.cache.length + count):
            sketch = layer.sketch.room(layer.cache, x.shape[0], kv_heads, count)
            room = None if sketch is None else room
    if layer is not None and room is not None:
        sinks = None if made.sinks is None else made.sinks.float()
        choice = _DENSE
        if sketch is not None:
            budget = _budget(layer.sparse, layer.cache.length + count)
            choice = (*sketch, *budget, *layer.sketch.sums(layer.cache))
        asked = (*made.options, sinks, *choice)
        attended = offer.attention(x, *before, *room, layer.cache.length, *asked)
        layer.cache.wrote(count)
        if sketch is not None:
            layer.sketch.wrote(count)
    else:
        query, key, value = offer.inputs(x, *before)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attended, _ = headwise_attention_forward(
            attention, query, key, value, mask, 0.0, **made.asks
        )
    if parts.own_mlp is None:
        return offer.outputs(x, attended.flatten(2), *made.after)
    total, normed = offer.sums(x, attended.flatten(2), *made.after)
    added = parts.own_mlp(normed)
    if parts.form.routes:
        added = added[0]
    if parts.norms[-1] is not None:
        added = parts.norms[-1](added)
    return total + (added if made.multiplier == 1.0 else added * made.multiplier)


def _is_known(cache: Any, index: int) -> bool:
    """Whether a cache and its layer are Transformers' or ours, whose updates read no keywords."""
    if cache is None:
        return True
    kinds = map(type, (cache, *getattr(cache, "layers", ())[index : index + 1]))
    ours = all(kind.__module__.startswith(("transformers.", "headwise.")) for kind in kinds)
    return ours and "update" not in cache.__dict__


def _own_layer(cache: Any, attention: Any) -> Any:
    """The layer whose buffers tokens are put into, where nothing but an append is to happen."""
    if type(cache) not in (OwnCache, DynamicCache) or cache.offloading:
        return None
    layers, index = cache.layers, attention.layer_idx
    layer = layers[index] if index < len(layers) else None
    own = isinstance(layer, OwnLayer) and type(layer.cache) in (
        ContiguousCache,
        DiskCache,
        PagedCache,
    )
    return layer if own else None


# Caches whose rows the operator puts where they belong.
_APPENDED = (ContiguousCache, DiskCache, PagedCache)
# No sketch, and no choice by one.
_DENSE: tuple[Any, ...] = (None, None, None, 0, 0, 0, 0, -1.0, None, 0)


def _budget(rule: Any, context: int) -> tuple[int, int, int, int, float]:
    """A layer's choice among so many keys, as the operator takes it."""
    mass = -1.0 if rule.mass is None else rule.mass
    return rule.sinks, rule.recent, rule.least, min(rule.most, context), mass


def _rotates(x: Tensor, given: Any, angles: int) -> bool:
    """Whether these are cos and sin [B or 1,S,angles], as the operator takes them."""
    return (
        type(given) is tuple
        and len(given) == 2
        and all(
            type(part) is Tensor
            and part.ndim == 3
            and part.shape[0] in (1, x.shape[0])
            and part.shape[1:] == (x.shape[1], angles)
            and part.dtype in (x.dtype, torch.float32)
            and part.is_cpu
            for part in given
        )
    )


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer stays with Transformers whatever it computes; None if nothing is in the way."""
    if "forward" in layer.__dict__:
        return "its forward is replaced already"
    touched = [name for name, module in layer.named_modules() if name and is_touched(module)]
    if touched:
        return f"its {touched[0]} has hooks, or a forward that is replaced already"
    return None
