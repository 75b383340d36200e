"""An `OwnCache` out of pages in memory, and pages out of one."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from headwise.base.mapped import reserve
from headwise.caches import CacheChoice, PagedCache
from headwise.errors import LoadError, UnsupportedError
from headwise.hf.cache import use_own_layers
from headwise.hf.own_cache import OwnCache
from headwise.hf.stock_names import DynamicCache
from headwise.hf.stored.identity import stamp_of
from headwise.hf.stored.layers import (
    Kept,
    kept_by,
    put_back,
    put_index_back,
    rows_of_layer,
)
from headwise.stored.layout import PAGE, PageLayout

# Pages behind those of files, at least; memory that is not written to costs nothing.
_ROOM = 1024


def memory_for(layout: PageLayout, pages: int) -> mmap.mmap:
    """Memory for pages of files, and behind them for as many new ones, at least 65,536 tokens."""
    room = max(pages, _ROOM)
    return reserve((pages + room) * layout.page_bytes, f"a cache of {pages} pages and its growth")


def kept_of(cache: OwnCache) -> tuple[list[Kept], PageLayout]:
    """What every layer keeps, and how its rows lie in a page.

    Raises:
        UnsupportedError: a layer of a kind that cannot be saved, or of another length.
    """
    fresh = DynamicCache(config=cache.read.model.config.get_text_config(decoder=True))
    if fresh.layer_class_to_replicate is None and len(fresh.layers) != len(cache.layers):
        raise UnsupportedError(
            f"the model has added layers to its cache, {len(cache.layers)} for {len(fresh.layers)}"
        )
    kept = [kept_by(layer, index) for index, layer in enumerate(cache.layers)]
    for layer, each in zip(cache.layers, kept, strict=True):
        length = layer.get_seq_length() if each.facts["kind"] != "none" else cache.read.length
        if length != cache.read.length:
            raise UnsupportedError(
                f"a layer of the cache holds {length} tokens, and {cache.read.length} were read: "
                "tokens were put into it by other means than the attached model"
            )
    return kept, PageLayout(tuple(rows for each in kept for rows in each.rows))


def page_of(
    cache: OwnCache, kept: Sequence[Kept], layout: PageLayout, sequence: int, begin: int, end: int
) -> bytearray:
    """The bytes of a page: tokens `begin` to `end` of a sequence, zeros behind them."""
    page = bytearray(layout.page_bytes)
    rows: dict[tuple[int, str], Tensor] = {}
    for index, (layer, each) in enumerate(zip(cache.layers, kept, strict=True)):
        if each.rows:
            held = rows_of_layer(layer, sequence, begin, end)
            rows |= {(index, name): tensor for name, tensor in held.items()}
    layout.fill(page, rows)
    return page


def cache_of(
    model: Any,
    kind: str,
    facts: Sequence[Mapping[str, Any]],
    pools: Mapping[tuple[int, str], Tensor],
    table: Tensor,
    fixed: Mapping[str, Tensor],
    ids: Tensor,
    real: Tensor,
) -> OwnCache:
    """A cache that has read `ids` [B, L], over pools of pages.

    kind: of `kind_of_choice`, behind which the sparse attention may stand that made it. facts,
    fixed: of `kept_by`, the names of `fixed` with their layer, as "3.first".

    Raises:
        LoadError: it is not a cache of this model.
    """
    batch, length = ids.shape
    kind = kind.partition(";")[0]
    pages = f"{'paged' if kind == 'exact' else kind}:{PAGE}"
    choice = CacheChoice.parse(kind if kind.startswith("window") else pages)
    config = model.config.get_text_config(decoder=True)
    cache = use_own_layers(DynamicCache(config=config), choice, model._headwise.sparse)
    assert isinstance(cache, OwnCache)
    more = cache.layer_class_to_replicate
    while more is not None and len(cache.layers) < len(facts):  # as an update does
        cache.layers.append(more())
    if len(facts) != len(cache.layers):
        raise LoadError(f"it has {len(facts)} layers, and the model's caches {len(cache.layers)}")
    device = model.device
    table = table.to(device)
    if any(fact["kind"] == "window" and fact["length"] != length for fact in facts):
        raise LoadError(f"its windows are not those after {length} tokens")
    for index, (layer, fact) in enumerate(zip(cache.layers, facts, strict=True)):
        own = {name: pool.to(device) for (at, name), pool in pools.items() if at == index}
        paged = None
        if fact["kind"] == "rows":
            names = choice.make().kept
            if not set(names) <= set(own):
                raise LoadError(f"layer {index} lacks rows")
            paged = PagedCache.over(
                [own[name] for name in names],
                table,
                [length] * batch,
                bits=choice.declared.bits,
            )
        prefix = f"{index}."
        tensors = {
            name.removeprefix(prefix): tensor.to(device)
            for name, tensor in fixed.items()
            if name.startswith(prefix)
        }
        put_back(layer, fact, paged, tensors, device)
        put_index_back(layer, own, table, length)
    cache.read.begin(model, stamp_of(model), ids, None if bool(real.all()) else real)
    return cache


def fixed_of(kept: Sequence[Kept]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that layers keep beside rows, [B, ...], with their layer in the name."""
    for index, each in enumerate(kept):
        for name, tensor in each.fixed.items():
            yield f"{index}.{name}", tensor
