"""Keys and values that a script keeps, and copies of caches, against stock Transformers."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import headwise
from families import VOCABULARY, make
from headwise.hf.cache_layers import OwnLayer
from older_stock import needs

# float32 rounding of about 1e-7, through 3 layers whose activations grow to about 10
LOGIT_TOLERANCE = 1e-4
EXACT = ("contiguous", "paged:4", "paged", "window:200", "window:200,sinks=4")
ROUNDED = ("int8", "int4")
SINKS = "window:9,sinks=3"

_generator = torch.Generator().manual_seed(5)
TEXT, OTHER, LAST = (
    torch.randint(3, VOCABULARY, (2, count), generator=_generator) for count in (12, 6, 4)
)
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # models this small are slower on two
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _on(model: Any, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Logits behind keys and values that were kept."""
    back = DynamicCache()
    for index, (keys, values) in enumerate(kept):
        back.update(keys, values, index)
    return model(LAST, cache=back).logits


def _kept(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _after_a_crop(model: Any, cache: Any) -> torch.Tensor:
    kept = _kept(cache)
    cache.crop(-7)
    model(OTHER, cache=cache)
    return _on(model, kept)


def _after_a_reorder(model: Any, cache: Any) -> torch.Tensor:
    kept = _kept(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    model(OTHER, cache=cache)
    return _on(model, kept)


def _after_a_selection(model: Any, cache: Any) -> torch.Tensor:
    kept = _kept(cache)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    model(OTHER, cache=cache)
    return _on(model, kept)


def _after_a_reset(model: Any, cache: Any) -> torch.Tensor:
    kept = _kept(cache)
    cache.reset()
    model(OTHER, cache=cache)
    return _on(model, kept)


def _of_a_part(model: Any, cache: Any) -> torch.Tensor:
    kept = [(keys[:, :, :9], values[:, :, :9]) for keys, values in _kept(cache)]
    cache.crop(-6)
    model(OTHER, cache=cache)
    return _on(model, kept)


def _put_into_another_cache(model: Any, cache: Any) -> torch.Tensor:
    other = model(OTHER, use_cache=True).cache
    for mine, its in zip(other.layers, cache.layers, strict=True):
        mine.keys, mine.values = its.keys, its.values
    cache.crop(-5)
    model(OTHER, cache=cache)
    return model(LAST, cache=other).logits


def _forked(cache: Any) -> Any:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _original_after_its_copy(model: Any, cache: Any) -> torch.Tensor:
    model(OTHER, cache=_forked(cache))
    return model(LAST, cache=cache).logits


def _copy_after_its_original(model: Any, cache: Any) -> torch.Tensor:
    fork = _forked(cache)
    model(OTHER, cache=cache)
    return model(LAST, cache=fork).logits


def _copies_of_copies(model: Any, cache: Any) -> torch.Tensor:
    # each takes a token of its own and is tried with another continuation, as a search does
    first = _forked(cache)
    model(OTHER[:, :1], cache=first)
    second = _forked(first)
    for one in (second, first, cache):
        model(OTHER, cache=_forked(one))
    model(OTHER[:, :3], cache=first)
    return torch.cat([model(LAST, cache=one).logits for one in (second, cache, first)], dim=1)


KEPT = (_after_a_crop, _after_a_reorder, _after_a_selection, _after_a_reset, _of_a_part)
KEPT += (_put_into_another_cache,)
COPIED = (_original_after_its_copy, _copy_after_its_original, _copies_of_copies)


def _name(value: Any) -> str:
    return value.__name__.strip("_") if callable(value) else str(value)


@torch.no_grad()
def _run(model: Any, scenario: Any) -> torch.Tensor:
    logits: torch.Tensor = scenario(model, model(TEXT, use_cache=True).cache)
    return logits


_EMPTIES = needs("5.20", "a cache that was reset keeps its length, with zeros")
ON: list[Any] = [
    pytest.param(family, at, marks=[_EMPTIES] if at is _after_a_reset else [])
    for family in ("llama-gqa", "deepseek_v3", "gpt2")
    for at in (*KEPT, *COPIED)
]
# stock caches the keys of every query head of Falcon, so no cache outlives attach there
ON += [("falcon-40b", at) for at in COPIED]
# a window that has lost tokens hands out no whole context
ROUNDED_ON = [(cache, at) for cache in ROUNDED for at in (*KEPT, *COPIED)]
ROUNDED_ON += [(SINKS, at) for at in COPIED]


@pytest.mark.parametrize(("family", "scenario"), ON, ids=_name)
def test_kept_keys_and_copies_give_the_logits_of_stock(family: str, scenario: Any) -> None:
    model = make(family)
    expected = _run(model, scenario)
    for cache in EXACT:
        headwise.attach(model, cache=cache)
        atol = LOGIT_TOLERANCE * expected.abs().max().item()
        torch.testing.assert_close(_run(model, scenario), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("scenario", COPIED, ids=_name)
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mistral"])
def test_copies_of_sliding_layers_give_the_logits_of_stock(family: str, scenario: Any) -> None:
    model = make(family)
    expected = _run(model, scenario)
    headwise.attach(model)
    atol = LOGIT_TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(_run(model, scenario), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("cache", "scenario"), ROUNDED_ON, ids=_name)
def test_kept_keys_and_copies_give_what_a_deep_copy_gives(
    cache: str, scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama-gqa")
    headwise.attach(model, cache=cache)
    given = _run(model, scenario)
    # the same, with memory of its own for whatever is kept or copied
    keys, values = OwnLayer.keys, OwnLayer.values
    if scenario in KEPT:
        monkeypatch.setattr(OwnLayer, "keys", property(_deep(keys.fget), keys.fset))
        monkeypatch.setattr(OwnLayer, "values", property(_deep(values.fget), values.fset))
    monkeypatch.setattr(OwnLayer, "__copy__", copy.deepcopy)
    assert torch.equal(given, _run(model, scenario))


def _deep(get: Any) -> Any:
    return lambda layer: copy.deepcopy(get(layer))


@pytest.mark.parametrize("cache", ["contiguous", "paged:4", *ROUNDED, SINKS])
def test_what_one_generation_returned_is_not_changed_by_the_next(cache: str) -> None:
    model = make("llama-gqa")
    headwise.attach(model, cache=cache)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(TEXT, **options).cache
    twin = copy.deepcopy(first)
    more = torch.cat([model.generate(TEXT, **options).sequences, LAST], dim=1)
    # the documented way to use a prefix again: a copy for each continuation
    one = model.generate(more, cache=copy.deepcopy(first), **options).sequences
    fork = _forked(first)
    assert torch.equal(model.generate(more, cache=fork, **options).sequences, one)
    with torch.no_grad():
        given, expected = (model(LAST, cache=at).logits for at in (first, twin))
    assert torch.equal(given, expected)


@torch.no_grad()
def test_a_layer_that_becomes_stock_leaves_its_copy_alone() -> None:
    model = make("llama-gqa")
    expected = _run(model, _copy_after_its_original)
    for cache in EXACT:
        headwise.attach(model, cache=cache)
        held = model(TEXT, use_cache=True).cache
        fork = _forked(held)
        with torch.enable_grad():
            model(OTHER, cache=held)
        assert {type(layer) for layer in held.layers} == {DynamicLayer}
        atol = LOGIT_TOLERANCE * expected.abs().max().item()
        given = model(LAST, cache=fork).logits
        torch.testing.assert_close(given, expected, atol=atol, rtol=0)


def _places(layer: Any) -> list[int]:
    """Where the rows of a layer lie."""
    if isinstance(layer.keys, headwise.hf.cached_rows.CachedRows):
        kv = layer.keys.kv
        names = ("key", "value", "key_scales", "value_scales")
        parts = [getattr(kv, name) for name in names if hasattr(kv, name)]
    else:
        parts = [layer.keys, layer.values]
    return [part.untyped_storage().data_ptr() for part in parts]


@pytest.mark.parametrize("helper", ["prompt lookup", "an assistant"])
@pytest.mark.parametrize("cache", ["contiguous", "paged:16", "int8", "int4", "window:200,sinks=4"])
def test_tokens_taken_back_while_generating_copy_nothing(
    cache: str, helper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, assistant = make("llama-gqa"), make("llama-gqa", num_hidden_layers=1)
    headwise.attach(model, cache=cache)
    headwise.attach(assistant, cache=cache)
    places: dict[int, list[Any]] = {}
    crops = []
    update, crop = OwnLayer.update, OwnLayer.crop

    def updated(layer: Any, *args: Any, **kwargs: Any) -> Any:
        handed = update(layer, *args, **kwargs)
        places.setdefault(id(layer), []).append((layer.cache.reserved_bytes, *_places(layer)))
        return handed

    def cropped(layer: Any, tokens: int) -> None:
        crops.append(tokens)
        crop(layer, tokens)

    monkeypatch.setattr(OwnLayer, "update", updated)
    monkeypatch.setattr(OwnLayer, "crop", cropped)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if helper == "an assistant":
        options = {"assistant_model": assistant}
    model.generate(REPEATING, max_new_tokens=24, do_sample=False, **options)
    assert min(crops) < 0
    for seen in places.values():
        # only a buffer that is full moves, to a larger one
        assert all(old[0] < new[0] for old, new in pairwise(seen) if old != new)
