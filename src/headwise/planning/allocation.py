"""What a cache takes in memory: Transformers' and headwise's own layers, filled with no memory.

The very classes that hold the cache at run time are given tensors on the meta device, which have a
shape and no bytes, and are then asked what they hold. Nothing about their growth is written twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import SpecError, UnsupportedError
from headwise.hf.cache import held_tensors, use_own_layers
from headwise.hf.cache_layers import OwnLayer
from headwise.hf.stock_names import (
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)
from headwise.planning.model import PlannedModel
from headwise.planning.stock_model import transformers_config, transformers_takes
from headwise.planning.workload import Workload
from headwise.spec import FAMILIES, AttentionSpec, LayerSpec, StateSpec, config_fields


@dataclass(frozen=True)
class Allocated:
    """Bytes of the cache: what the architecture needs, what each of the two allocates for it.

    None where Transformers has no such model.
    """

    needed: int
    stock: int | None
    headwise: int | None


def cache_allocation(model: PlannedModel, workload: Workload) -> Allocated:
    """What the model's cache takes.

    Raises:
        SpecError: a config of which Transformers makes no cache, or one that does not fit the spec.
    """
    needed = workload.cache_bytes(model.spec)
    if not model.spec.layers:
        return Allocated(0, 0, 0)
    try:
        return Allocated(needed, stock_bytes(model, workload), headwise_bytes(model, workload))
    except UnsupportedError:
        return Allocated(needed, None, None)


def stock_bytes(model: PlannedModel, workload: Workload) -> int:
    """Bytes that Transformers' own cache has allocated, in the model's dtype.

    After a prompt of all tokens but one, and one decode step: a sliding layer still holds the
    storage of the window and the newest token. What the step copies on its way is not counted.

    Raises:
        SpecError: a config of which Transformers makes no cache, or one that does not fit the spec.
    """
    own, cross = _caches(model)
    # its layers take fields of the config that no reader looks at
    with transformers_takes(model):
        _fill(model, own, cross, workload, stock_heads(model))
    return allocated(own, cross)


def headwise_bytes(model: PlannedModel, workload: Workload) -> int:
    """Bytes that the caches have allocated which `attach` makes, with the room that they grow by.

    After a prompt of all tokens but one, and one decode step.
    """
    if model.spec.has_cross_attention and not model.spec.encoder_layers:
        # attach leaves the cache of a decoder that is given an encoder's output to Transformers
        return stock_bytes(model, workload)
    own, cross = _caches(model)
    use_own_layers(own, workload.cache.choice)
    _fill(model, own, cross, workload, None)
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
            total += sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    return total


def stock_heads(model: PlannedModel) -> int | None:
    """kv heads that Transformers caches where these are more than the model has, else None."""
    repeated = FAMILIES[model.spec.family].stock_kv_heads
    return None if repeated is None else repeated(config_fields(model.config))


def _caches(model: PlannedModel) -> tuple[Any, Any]:
    """Empty caches of Transformers: for the decoder's own tokens, for those of an encoder."""
    config = transformers_config(model)
    # T5's config describes both its stacks, and its decoder's depth may differ.
    if model.spec.has_cross_attention:
        return DynamicCache(), DynamicCache()
    with transformers_takes(model):
        own = DynamicCache(config=config)
    _check_layers(model, own)
    return own, None


def _check_layers(model: PlannedModel, cache: Any) -> None:
    """Raise unless each layer of the cache can hold what its layer of the spec caches.

    The two are read from different fields where a config contradicts itself: a family whose reader
    knows no layer_types, with layer_types.
    """
    # before Transformers 5.23 a cache ends before the layers that read the keys of others
    holding = [layer.index for layer in model.spec.layers if layer.shares is None]
    if len(cache.layers) <= max(holding):
        raise SpecError(
            f"{model.name}: Transformers makes a cache of {len(cache.layers)} layers of this, "
            f"expected {len(model.spec.layers)}; correct layer_types"
        )
    for layer, made in zip(model.spec.layers, cache.layers, strict=False):
        missing = ""
        if layer.cached is not None and not isinstance(made, CacheLayerMixin):
            missing = "keys and values"
        elif (
            layer.cached
            and layer.cached.cache_rows.index_dim
            and not hasattr(made, "update_indexer")
        ):
            missing = "an indexer's keys"
        state = isinstance(layer.mixer, StateSpec)
        if state and not isinstance(made, LinearAttentionCacheLayerMixin):
            missing = "a state"
        if missing:
            raise SpecError(
                f"{model.name}: layer {layer.index} caches {missing}, and Transformers makes a "
                f"{type(made).__name__} of this config, which holds none; correct layer_types"
            )


@torch.no_grad()
def _fill(model: PlannedModel, own: Any, cross: Any, workload: Workload, heads: int | None) -> None:
    """Append the workload's tokens, those of a decoder with `heads` kv heads if that is given."""
    steps = (workload.context - 1, 1) if workload.context > 1 else (workload.context,)
    for tokens in steps:
        for layer in model.spec.layers:
            _append(own, layer, workload, tokens, heads)
    for layer in model.spec.layers:
        if layer.cross_attention is not None:
            rows = _rows(layer.cross_attention, workload, workload.encoder_context, None)
            cross.update(*rows, layer.index)


def _append(
    cache: Any, layer: LayerSpec, workload: Workload, tokens: int, heads: int | None
) -> None:
    mixer, dtype = layer.mixer, workload.cache.dtype
    if layer.cached is not None:
        cache.update(*_rows(layer.cached, workload, tokens, heads), layer.index)
        if layer.cached.cache_rows.index_dim:
            keys = _empty(dtype, workload.batch, tokens, layer.cached.cache_rows.index_dim)
            cache.update_indexer(keys, layer.index)
    if isinstance(mixer, StateSpec):
        made = cache.layers[layer.index]
        inputs = _empty(dtype, workload.batch, mixer.conv_channels, tokens)
        made.update_conv_state(inputs, conv_kernel_size=mixer.conv_width)
        if mixer.heads:
            made.update_recurrent_state(
                _empty("float32", workload.batch, mixer.heads, mixer.key_dim, mixer.value_dim)
            )


def _rows(spec: AttentionSpec, workload: Workload, tokens: int, heads: int | None) -> list[Tensor]:
    rows = spec.cache_rows
    shape = (workload.batch, heads or rows.heads, tokens)
    return [_empty(workload.cache.dtype, *shape, dim) for dim in rows.dims]


def _empty(dtype: str, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")
