"""What a cache takes in memory: Transformers' and headwise's own layers, filled with no memory.

The very classes that hold the cache at run time are given tensors on the meta device, which have a
shape and no bytes, and are then asked what they hold. Nothing about their growth is written twice.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import SpecError
from headwise.hf.cache import OwnLayer, held_tensors, use_own_layers
from headwise.planning.cached import CacheFormat
from headwise.planning.model import Model
from headwise.planning.weights import transformers_config, transformers_takes
from headwise.spec import FAMILIES, AttentionSpec, LayerSpec, StateSpec, config_fields


def stock_bytes(model: Model, dtype: str, context: int, batch: int, encoder_context: int) -> int:
    """Bytes that Transformers' own cache has allocated, in the model's dtype.

    After a prompt of all tokens but one, and one decode step: a sliding layer still holds the
    storage of the window and the newest token. What the step copies on its way is not counted.

    Raises:
        SpecError: a config of which Transformers makes no cache, or one that does not fit the spec.
    """
    own, cross = _caches(model)
    heads = stock_heads(model)
    # its layers take fields of the config that no reader looks at
    with transformers_takes(model):
        _fill(model, own, dtype, context, batch, heads)
        _fill_cross(model, cross, dtype, batch, encoder_context)
    return allocated(own, cross)


def headwise_bytes(
    model: Model, cache: CacheFormat, context: int, batch: int, encoder_context: int
) -> int:
    """Bytes that the caches have allocated which `attach` makes, with the room that they grow by.

    After a prompt of all tokens but one, and one decode step.
    """
    if model.spec.has_cross_attention and not model.spec.encoder_layers:
        # attach leaves the cache of a decoder that is given an encoder's output to Transformers
        return stock_bytes(model, cache.dtype, context, batch, encoder_context)
    own, cross = _caches(model)
    use_own_layers(own, cache.choice)
    _fill(model, own, cache.dtype, context, batch, None)
    _fill_cross(model, cross, cache.dtype, batch, encoder_context)
    return allocated(own, cross)


def allocated(*caches: Any) -> int:
    """Bytes of memory that Transformers caches hold on to, their own layers or ours; None is 0."""
    total = 0
    for cache in caches:
        for layer in [] if cache is None else cache.layers:
            if isinstance(layer, OwnLayer):
                total += int(layer.cache.reserved_bytes)
                continue
            storages = map(Tensor.untyped_storage, held_tensors(layer))
            total += sum({at._cdata: at.nbytes() for at in storages}.values())
    return total


def stock_heads(model: Model) -> int | None:
    """kv heads that Transformers caches where these are more than the model has, else None."""
    repeated = FAMILIES[model.spec.family].stock_kv_heads
    return None if repeated is None else repeated(config_fields(model.config))


def _caches(model: Model) -> tuple[Any, Any]:
    from transformers import DynamicCache

    config = transformers_config(model)
    cross = DynamicCache() if model.spec.has_cross_attention else None
    # T5's config describes both its stacks, and its decoder's depth may differ.
    if cross is not None:
        return DynamicCache(), cross
    with transformers_takes(model):
        own = DynamicCache(config=config)
    _check_layers(model, own)
    return own, cross


def _check_layers(model: Model, cache: Any) -> None:
    """Raise unless each layer of the cache can hold what its layer of the spec caches.

    The two are read from different fields where a config contradicts itself: a family whose reader
    knows no layer_types, with layer_types.
    """
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    if len(cache.layers) < len(model.spec.layers):
        raise SpecError(
            f"{model.name}: Transformers makes a cache of {len(cache.layers)} layers of this, "
            f"expected {len(model.spec.layers)}; correct layer_types"
        )
    for layer, made in zip(model.spec.layers, cache.layers, strict=False):
        cached = layer.cached
        fits = {
            "keys and values": cached is None or isinstance(made, CacheLayerMixin),
            "an indexer's keys": cached is None
            or cached.indexer is None
            or hasattr(made, "update_indexer"),
            "a state": not isinstance(layer.mixer, StateSpec)
            or isinstance(made, LinearAttentionCacheLayerMixin),
        }
        for what, held in fits.items():
            if not held:
                raise SpecError(
                    f"{model.name}: layer {layer.index} caches {what}, and Transformers makes a "
                    f"{type(made).__name__} of this config, which holds none; correct layer_types"
                )


def _fill(
    model: Model, cache: Any, dtype: str, context: int, batch: int, heads: int | None
) -> None:
    with torch.no_grad():
        for tokens in (context - 1, 1) if context > 1 else (context,):
            for layer in model.spec.layers:
                _append(cache, layer, dtype, tokens, batch, heads)


def _append(
    cache: Any, layer: LayerSpec, dtype: str, tokens: int, batch: int, heads: int | None
) -> None:
    if layer.cached is not None:
        cache.update(*_rows(layer.cached, dtype, tokens, batch, heads), layer.index)
        if layer.cached.indexer is not None:
            keys = _empty(dtype, batch, tokens, layer.cached.indexer.dim)
            cache.update_indexer(keys, layer.index)
    state = layer.mixer
    if isinstance(state, StateSpec):
        inputs = _empty(dtype, batch, state.conv_channels, tokens)
        matrices = _empty("float32", batch, state.heads, state.key_dim, state.value_dim)
        width = {"conv_kernel_size": state.conv_width}
        cache.layers[layer.index].update_conv_state(inputs, **width)
        cache.layers[layer.index].update_recurrent_state(matrices)


def _fill_cross(model: Model, cache: Any, dtype: str, batch: int, encoder_context: int) -> None:
    if cache is None:
        return
    with torch.no_grad():
        for layer in model.spec.layers:
            assert layer.cross_attention is not None
            rows = _rows(layer.cross_attention, dtype, encoder_context, batch, None)
            cache.update(*rows, layer.index)


def _rows(
    spec: AttentionSpec, dtype: str, tokens: int, batch: int, heads: int | None
) -> tuple[Tensor, Tensor]:
    rows = spec.cache_rows
    first, second = (_empty(dtype, batch, heads or rows.heads, tokens, dim) for dim in rows.dims)
    return first, second


def _empty(dtype: str, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")
