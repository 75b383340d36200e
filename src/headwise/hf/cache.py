"""headwise's caches in the place of Transformers' own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.caches import CacheChoice, DiskCache
from headwise.hf.cache_layers import (
    ContiguousLayer,
    OwnLayer,
    SinksLayer,
    ViewLayer,
    WindowLayer,
)
from headwise.hf.hybrid_layers import HybridLayer, HybridSinksLayer, HybridViewLayer
from headwise.hf.indexed_layers import IndexedLayer, IndexedViewLayer, IndexKeys
from headwise.hf.own_cache import OwnCache, TokensRead
from headwise.hf.parallel.layer import SplitLayer
from headwise.hf.sparse import SparseLayers
from headwise.hf.stock_names import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
)
from headwise.ops import row_bytes

_DEFAULT = CacheChoice()
# The layer for a cache, by what the cache gives.
_LAYERS: dict[str, Any] = {
    "rows": ContiguousLayer,
    "view": ViewLayer,
    "part": SinksLayer,
    "split": SplitLayer,
}
_INDEXED = (
    "transformers.cache_utils.DynamicIndexedLayer",
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLSparseCacheLayer",
)
_INDEXED_LAYERS: dict[str, Any] = {"rows": IndexedLayer, "view": IndexedViewLayer}
_HYBRID_LAYERS: dict[str, Any] = {
    "rows": HybridLayer,
    "view": HybridViewLayer,
    "part": HybridSinksLayer,
}


def use_own_layers(
    cache: Cache, choice: CacheChoice = _DEFAULT, sparse: SparseLayers | None = None
) -> Cache:
    """Replace the layers of a fresh, stock `DynamicCache` by ours, in place.

    `choice` is for the layers that see all tokens, which choose among them as `sparse` says; those
    with a sliding window hold what it reaches. Layers of other kinds (linear attention, quantised,
    static) stay as they are, and so does the cross-attention cache, which is written once. The
    cache becomes an `OwnCache`.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if type(own) is not DynamicCache or own.offloading:
        return cache
    own.__class__ = OwnCache
    own.read = TokensRead()
    own.layers = [_own_layer(layer, choice) for layer in own.layers]
    for index, layer in enumerate(own.layers):
        _make_sparse(layer, index, sparse)
    if own.layer_class_to_replicate is DynamicLayer:
        # anything that makes a layer when called will do
        own.layer_class_to_replicate = _NextLayer(choice, sparse, len(own.layers))
    return cache


@dataclass
class _NextLayer:
    """Makes the layers that a cache gets when it is first written to, one after the other."""

    choice: CacheChoice
    sparse: SparseLayers | None
    index: int

    def __call__(self) -> OwnLayer:
        layer = _full_layer(self.choice)
        _make_sparse(layer, self.index, self.sparse)
        self.index += 1
        return layer


def _make_sparse(layer: Any, index: int, sparse: SparseLayers | None) -> None:
    """Have a layer that holds every token choose among them, where it is one of those that do."""
    whole = isinstance(layer, ContiguousLayer) and not isinstance(layer, IndexKeys)
    if sparse is not None and whole:
        layer.sparse = sparse.of(index)
    if isinstance(layer, OwnLayer) and isinstance(layer.cache, DiskCache):
        layer.cache.sketched = layer.sparse is not None


def _full_layer(choice: CacheChoice) -> OwnLayer:
    cache = choice.make()
    return _LAYERS[cache.gives](cache)


def _own_layer(layer: Any, choice: CacheChoice) -> Any:
    if type(layer) is DynamicLayer:
        return _full_layer(choice)
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    if _is_indexed(type(layer)):
        cache = choice.make()
        kind = _INDEXED_LAYERS.get(cache.gives)
        # a cache that drops tokens has none: an indexer chooses among all
        return layer if kind is None else kind(cache, type(layer))
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        cache = choice.make()
        made = _HYBRID_LAYERS.get(cache.gives)
        # with a state, the tokens of every rank are all of them
        return layer if made is None else made(cache, layer.number_of_states)
    return layer


def _is_indexed(kind: type) -> bool:
    """Whether layers are Transformers' own with an indexer's keys, which 5.17 does not have."""
    return f"{kind.__module__}.{kind.__name__}" in _INDEXED


def cache_name(layer: Any) -> str:
    """What holds a layer's tokens, by the names that `attach` takes; "none" if it is not ours."""
    return str(layer.cache.name) if isinstance(layer, OwnLayer) else "none"


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the tokens held by a Transformers cache take, its own layers or ours.

    A static cache counts its whole capacity, which is what it holds.
    """
    if isinstance(cache, EncoderDecoderCache):
        return cache_nbytes(cache.self_attention_cache) + cache_nbytes(cache.cross_attention_cache)
    return sum(_layer_nbytes(layer) for layer in cache.layers)


def held_tensors(layer: Any) -> Iterator[Tensor]:
    """What a layer of Transformers' own holds: keys and values, an indexer's keys, states."""
    for name in ("keys", "values", "indexer_keys", "idx_keys"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            yield tensor
    yield from _states(layer)


def _states(layer: Any) -> Iterator[Tensor]:
    for name in ("conv_states", "recurrent_states"):
        yield from (
            state for state in getattr(layer, name, {}).values() if isinstance(state, Tensor)
        )


def read_nbytes(cache: Cache) -> int:
    """Bytes that a step of one token reads of a cache: all, or a sketch and what is chosen by it.

    An indexer's choice is not looked at.
    """
    if isinstance(cache, EncoderDecoderCache):
        return read_nbytes(cache.self_attention_cache) + cache_nbytes(cache.cross_attention_cache)
    return sum(map(_layer_reads, cache.layers))


def _layer_reads(layer: Any) -> int:
    if not isinstance(layer, OwnLayer) or layer.sparse is None:
        return _layer_nbytes(layer)
    length = layer.cache.length
    if not layer.chooses(1, length):
        return int(layer.cache.nbytes)
    keys: Any = layer.keys
    batch, heads, _, dim = keys.shape
    sketch = batch * heads * length * row_bytes(dim, 4)
    return int(sketch + layer.cache.nbytes * layer.sparse.read_at(length) // length)


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, OwnLayer):
        more = layer.sketch.nbytes
        more += layer.index_nbytes if isinstance(layer, IndexKeys) else 0
        if isinstance(layer, HybridLayer):
            more += sum(state.nbytes for state in _states(layer))
        return int(layer.cache.nbytes) + more
    return sum(tensor.nbytes for tensor in held_tensors(layer))
