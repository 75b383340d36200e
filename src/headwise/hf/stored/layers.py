"""What each layer of a cache keeps, taken out of it and put back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.caches import CacheChoice, PagedCache, WindowCache
from headwise.errors import LoadError, UnsupportedError
from headwise.hf.cache import held_tensors
from headwise.hf.cache_layers import OwnLayer, ViewLayer
from headwise.hf.hybrid_layers import OF_STATES
from headwise.hf.indexed_layers import IndexKeys
from headwise.hf.stock_names import LinearAttentionCacheLayerMixin
from headwise.stored.layout import NAMES, PAGE, Rows

DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
_INDEX, _PLACES = "index", "places"


@dataclass
class Kept:
    """What a layer keeps.

    facts: plain data, of which "kind" says what it is. rows: what it keeps of each token, the
    names, heads, dims and dtypes. fixed: tensors [B, ...] that are of all tokens at once.
    """

    facts: dict[str, Any]
    rows: list[Rows] = field(default_factory=list)
    fixed: dict[str, Tensor] = field(default_factory=dict)


def kept_by(layer: Any, index: int) -> Kept:
    """What layer number `index` keeps.

    Raises:
        UnsupportedError: a layer that is not known.
    """
    states = isinstance(layer, LinearAttentionCacheLayerMixin)
    if isinstance(layer, OwnLayer):
        if layer.cache.gives == "split":
            raise UnsupportedError(
                f"layer {index} of the cache is spread over {layer.cache.share.ranks} processes, "
                "of which each holds a part: save one that was made without context_parallel"
            )
        kept = _of_tokens(layer, index)
    elif getattr(layer, "keys", None) is None and (
        states or next(held_tensors(layer), None) is None
    ):
        kept = Kept({"kind": "none"})
    else:
        raise UnsupportedError(
            f"layer {index} of the cache is a {type(layer).__name__}, not one of headwise: save a "
            "cache that an attached model made"
        )
    if states:
        _add_states(layer, kept)
    return kept


def rows_of_layer(layer: Any, sequence: int, begin: int, end: int) -> dict[str, Tensor]:
    """What a layer keeps of tokens `begin` to `end` of a sequence, [heads, S, dim] by name."""
    cache = layer.cache
    rows = dict(zip(cache.kept, cache.rows(sequence, begin, end), strict=True))
    if isinstance(layer, IndexKeys):
        if layer.index.batch is not None:
            rows[_INDEX] = layer.index.rows(sequence, begin, end)[0]
        if layer.indexer_position_ids is not None:
            rows[_PLACES] = layer.indexer_position_ids[:, sequence, begin:end, None]
    return rows


def put_back(
    layer: Any,
    facts: Mapping[str, Any],
    cache: PagedCache | None,
    fixed: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Have a fresh layer hold what `kept_by` found; `cache` has its rows.

    Raises:
        LoadError: it is not a layer of that kind.
    """
    kind = str(facts["kind"])
    if isinstance(layer, OwnLayer) and isinstance(layer.cache, WindowCache):
        expected = "window"
    else:
        expected = "rows" if isinstance(layer, ViewLayer) else "none"
    states = isinstance(layer, LinearAttentionCacheLayerMixin)
    wanted = {expected, "none"} if expected != "none" else {"none"}
    if kind not in wanted or ("states" in facts) != states or (cache is None) != (kind != "rows"):
        raise LoadError(f"a layer is of kind {kind[:40]}, and the model's is {expected}")
    if kind == "window":
        _check_window(layer.cache, facts)
        first, second = fixed["first"], fixed["second"]
        layer.cache.hold(first, second, int(facts["length"]))
    elif kind == "rows":
        assert isinstance(layer, ViewLayer)
        assert cache is not None
        layer.cache = cache
        layer.dtype = DTYPES_BY_NAME[facts["dtype"]]
    if kind != "none":
        layer.device = device
    if states:
        _put_states_back(layer, facts["states"], fixed)


def put_index_back(layer: Any, pools: Mapping[str, Tensor], table: Tensor, length: int) -> None:
    """Have a layer hold the keys of its indexer, copied out of pages."""
    places = pools.get(_PLACES)
    if isinstance(layer, IndexKeys) and _INDEX in pools:
        keys = _gathered(pools[_INDEX], table, length)
        layer.index.append(keys, keys[..., :0])
    if isinstance(layer, IndexKeys) and places is not None:
        layer.indexer_position_ids = _gathered(places, table, length)[..., 0].transpose(0, 1)


def _gathered(pool: Tensor, table: Tensor, length: int) -> Tensor:
    """[B, heads, length, dim] out of [heads, pages, 64, dim]."""
    rows = pool.transpose(0, 1)[table.long()]  # [B, n, heads, 64, dim]
    return rows.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _of_tokens(layer: OwnLayer, index: int) -> Kept:
    cache = layer.cache
    if cache.batch is None:
        return Kept({"kind": "none"})
    if isinstance(cache, WindowCache):
        facts = {"window": cache.window, "sinks": cache.sinks, "length": cache.length}
        first, second = cache.first, cache.second
        assert first is not None
        assert second is not None
        if cache.recording and cache.sinks and first.shape[2] != cache.held:
            raise UnsupportedError("a cache of assisted decoding is not saved: it holds more")
        held = first.shape[2] - cache.held
        fixed = {"first": first[:, :, held:], "second": second[:, :, held:]}
        return Kept({"kind": "window", **facts}, fixed=fixed)
    dtype = layer.dtype if isinstance(layer, ViewLayer) else cache.first.dtype
    rows = rows_of_layer(layer, 0, 0, 0)
    return Kept(
        {"kind": "rows", "dtype": str(dtype).removeprefix("torch.")},
        [Rows(index, n, t.dtype, t.shape[0], t.shape[2]) for n, t in rows.items()],
    )


def _check_window(cache: WindowCache, facts: Mapping[str, Any]) -> None:
    own = {"window": cache.window, "sinks": cache.sinks}
    given = {name: facts[name] for name in own}
    if own != given:
        raise LoadError(f"a layer holds {given}, and the model's {own}")


def _add_states(layer: Any, kept: Kept) -> None:
    facts: dict[str, Any] = {}
    for name in OF_STATES:
        value = getattr(layer, name)
        if isinstance(value, dict):
            plain = {str(at): each for at, each in value.items() if not isinstance(each, Tensor)}
            for at, each in value.items():
                if isinstance(each, Tensor):
                    kept.fixed[f"{name}.{at}"] = each
            facts[name] = plain
        else:
            facts[name] = value
    if layer.record_past:
        raise UnsupportedError("a cache of assisted decoding is not saved: its states hold more")
    kept.facts["states"] = facts


def _put_states_back(layer: Any, facts: Mapping[str, Any], fixed: Mapping[str, Tensor]) -> None:
    for name in OF_STATES:
        given = facts[name]
        if isinstance(given, dict):
            values = {int(at): each for at, each in given.items()}
            for key, tensor in fixed.items():
                kind, _, at = key.partition(".")
                if kind == name:
                    values[int(at)] = tensor
                    layer.device, layer.dtype = tensor.device, tensor.dtype
            setattr(layer, name, dict(sorted(values.items())))
        else:
            setattr(layer, name, given)


def kind_of_choice(choice: CacheChoice) -> str:
    """How a cache keeps rows: "exact", "int8", "int4", or "window:W,sinks=S"."""
    if choice.kind == "window":
        return str(choice)
    bits = choice.declared.bits
    return "exact" if bits is None else f"int{bits}"


def kind_of_cache(layers: list[Any]) -> str:
    """How the rows of a cache are kept; the windows that a model has of its own do not count."""
    for layer in layers:
        if isinstance(layer, OwnLayer) and not layer.is_sliding:
            return kind_of_choice(CacheChoice.parse(layer.cache.name))
    return "exact"


def page_count(length: int) -> int:
    """Pages that so many tokens need."""
    return -(-length // PAGE)
