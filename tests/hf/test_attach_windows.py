"""Sliding windows reach the kernels as a number: no mask of queries by keys is made at prefill."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import headwise
from families import HYBRID, VOCABULARY, WINDOW
from headwise.hf import masks, window_mask
from headwise.hf.interface import headwise_attention_forward
from headwise.hf.masks import headwise_mask
from headwise.hf.observer import Seen, observing
from headwise.hf.window_mask import WindowMask, is_window

IDS = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(4))
PADDING = torch.ones_like(IDS)
PADDING[0, :5] = 0
CPU = torch.device("cpu")

# headwise has no spec reader for them, and does not know whether their modules pass the window on
SLIDING = {
    "Cohere2": HYBRID,
    "Olmo3": HYBRID,
    "Starcoder2": None,
    "Ministral3": None,
}


def _make(name: str, layer_types: list[str] | None, **changes: Any) -> Any:
    torch.manual_seed(11)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "sliding_window": WINDOW,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if layer_types is not None:
        sizes["layer_types"] = layer_types
    config = getattr(hf, f"{name}Config")(**(sizes | changes))
    return hf.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def _runs(model: Any, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a prompt, whole and the end of it on a cache; and tokens."""
    real = attention_mask.bool()
    first = model(IDS[:, :13], attention_mask=attention_mask[:, :13])
    return [
        model(IDS, attention_mask=attention_mask, use_cache=False).logits[real],
        model(IDS[:, 13:], attention_mask=attention_mask, cache=first.cache).logits,
        model.generate(IDS, attention_mask=attention_mask, max_new_tokens=9, do_sample=False),
    ]


@contextmanager
def _no_booleans() -> Iterator[None]:
    def skipped(*args: Any, **kwargs: Any) -> None:
        assert sdpa_mask(*args, **kwargs) is None

    def dense(mask: WindowMask) -> torch.Tensor:
        raise AssertionError(f"the booleans of {mask} were made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "sdpa_mask", skipped)
        patch.setattr(WindowMask, "dense", dense)
        yield


def _compare(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, stock in zip(given[:2], expected[:2], strict=True):
        tolerance = 1e-4 * stock.abs().max().item()
        torch.testing.assert_close(ours, stock, atol=tolerance, rtol=0)
    assert torch.equal(given[2], expected[2])


@pytest.mark.parametrize("name", SLIDING)
def test_no_mask_is_made_for_windows_of_any_family(name: str) -> None:
    model = _make(name, SLIDING[name])
    whole, padded = _runs(model, torch.ones_like(IDS)), _runs(model, PADDING)
    headwise.attach(model)
    with _no_booleans():
        _compare(_runs(model, torch.ones_like(IDS)), whole)
    _compare(_runs(model, PADDING), padded)


@contextmanager
def _operator_calls() -> Iterator[list[Seen]]:
    calls: list[Seen] = []

    def see(call: Seen) -> torch.Tensor:
        calls.append(call)
        return call.out

    with observing(see):
        yield calls


@pytest.mark.parametrize("name", ["Cohere2", "Starcoder2"])
def test_the_operator_is_given_the_window(name: str) -> None:
    model = _make(name, SLIDING[name])
    headwise.attach(model)
    with torch.no_grad(), _operator_calls() as calls:
        model(IDS)
    kinds = SLIDING[name] or ["sliding_attention"] * 3
    windows = [WINDOW if kind == "sliding_attention" else None for kind in kinds]
    assert [call.options.window for call in calls] == windows
    assert all(call.options.causal and call.options.mask is None for call in calls)


def test_chunks_are_not_a_window() -> None:
    model = _make(
        "Llama4Text",
        ["chunked_attention", "full_attention", "chunked_attention"],
        attention_chunk_size=WINDOW,
        intermediate_size_mlp=64,
        num_local_experts=2,
        moe_layers=[],
    )
    whole, padded = _runs(model, torch.ones_like(IDS)), _runs(model, PADDING)
    headwise.attach(model)
    _compare(_runs(model, torch.ones_like(IDS)), whole)
    _compare(_runs(model, PADDING), padded)


def _mask(queries: int, keys: int, function: Any, first: int = 0) -> torch.Tensor | None:
    return headwise_mask(
        batch_size=2,
        q_length=queries,
        kv_length=keys,
        q_offset=first + keys - queries,
        kv_offset=first,
        mask_function=function,
        local_size=WINDOW,
        device=CPU,
    )


@pytest.mark.parametrize(("queries", "keys"), [(20, 20), (4, 10), (4, WINDOW), (1, 12)])
def test_what_hides_keys_is_a_rule_of_the_booleans_that_stock_makes(
    queries: int, keys: int
) -> None:
    function = sliding_window_causal_mask_function(WINDOW)
    mask = _mask(queries, keys, function, first=3)
    assert isinstance(mask, WindowMask)
    assert (mask.shape, mask.ndim, mask.dtype, mask.device) == (
        (2, 1, queries, keys),
        4,
        torch.bool,
        CPU,
    )
    stock = sdpa_mask(
        batch_size=2,
        q_length=queries,
        kv_length=keys,
        q_offset=3 + keys - queries,
        kv_offset=3,
        mask_function=function,
        allow_is_causal_skip=False,
    )
    assert mask.booleans is None
    for derived in (mask.clone(), mask[:], ~~mask, mask.to(torch.float32).bool()):
        assert type(derived) is torch.Tensor
        assert torch.equal(derived, stock)
    assert torch.equal(torch.where(mask, 1.0, -2.0), torch.where(stock, 1.0, -2.0))


def test_a_token_in_a_window_that_is_just_full_has_no_mask() -> None:
    assert _mask(1, WINDOW, sliding_window_causal_mask_function(WINDOW), first=40) is None
    chunks = chunked_causal_mask_function(WINDOW, torch.zeros(2, dtype=torch.long))
    mask = _mask(1, WINDOW, chunks, first=40)  # the query is at 46, its chunk begins at 42
    assert mask is not None
    assert mask[0, 0, 0].tolist() == [False, False, True, True, True, True, True]


def _chunks(size: int) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: (k <= q) & (k // size == q // size)


def _sinks(window: int) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: (k <= q) & ((k > q - window) | (k < 2))


def _gaps(window: int) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: (k <= q) & (k > q - window) & ((q - k) % 2 == 0)


def _endless(window: int) -> Callable[..., torch.Tensor]:
    def function(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return (k <= q) & (k > q - window) if q is not None else function(b, h, k, k)

    return function


@pytest.mark.parametrize("window", [1, 2, 6, 7])
def test_only_causality_and_the_window_are_the_rule(window: int) -> None:
    assert is_window(sliding_window_causal_mask_function(window), window)
    offsets = torch.zeros(2, dtype=torch.long)
    others: list[Any] = [
        causal_mask_function,
        sliding_window_causal_mask_function(window + 1),
        sliding_window_bidirectional_mask_function(window),
        chunked_causal_mask_function(window, offsets),
        _sinks(window),
        _endless(window),
    ]
    if window > 1:  # chunks of one token are windows of one, and have no gaps
        others += [_chunks(window), _gaps(window)]
    assert not any(is_window(function, window) for function in others)
    # another function of the same code
    assert not is_window(sliding_window_causal_mask_function(window), window + 1)


def test_nothing_is_visible_in_a_window_of_none() -> None:
    assert not is_window(sliding_window_causal_mask_function(0), 0)


@pytest.mark.parametrize("written", ["in place", "through a view"])
def test_a_mask_that_a_module_has_written_to_holds(written: str) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 1, 2, 12, 8, generator=generator).unbind()
    mask = WindowMask((1, 1, 12, 12), WINDOW, CPU)
    if written == "in place":
        mask[:, :, :, 0] = True
    else:
        mask[..., :1].fill_(True)
    visible = torch.ones(12, 12, dtype=torch.bool).tril().triu(1 - WINDOW)
    visible[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible)
    out, _ = headwise_attention_forward(torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_module_that_is_not_causal_follows_its_mask() -> None:
    """Gemma 2 to both sides says so of its modules, and nothing of its masks."""
    model = _make("Gemma2", HYBRID, use_bidirectional_attention=True)
    slides = next(module for module in model.modules() if hasattr(module, "is_causal"))
    assert not slides.is_causal
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        headwise.attach(model)
        with _operator_calls() as calls:
            given = model(IDS, use_cache=False).logits
    torch.testing.assert_close(given, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert [call.options.window for call in calls] == [WINDOW, None, WINDOW]


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_compiler_is_given_booleans_or_the_number(part: str) -> None:
    model = _make("Cohere2", HYBRID)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        headwise.attach(model)
        torch._dynamo.reset()
        if part == "model":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(masks, "WindowMask", None)  # must not be made while tracing
                given = torch.compile(model, fullgraph=True, backend="eager")(IDS, use_cache=False)
        else:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="eager")
            with _no_booleans():
                given = model(IDS, use_cache=False)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(given.logits, expected, atol=tolerance, rtol=0)


def test_functions_are_told_apart_once() -> None:
    window = 31
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        look = window_mask._is_window
        patch.setattr(window_mask, "_is_window", lambda *a: calls.append(a) or look(*a))
        for _ in range(3):
            assert is_window(sliding_window_causal_mask_function(window), window)
    assert len(calls) == 1


OFFSET = 0


def test_a_rule_that_may_change_or_looks_at_a_sequence_is_no_window() -> None:
    def sees_more(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - 4) | (key < OFFSET)

    def of_one_sequence(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - 4) | (key == 0) & (batch == 1)

    def of_one_head(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - 4) & ((head + 1) > 0)

    def positions(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - 4)

    assert is_window(positions, 4)
    assert not any(is_window(each, 4) for each in (sees_more, of_one_sequence, of_one_head))


def test_what_looks_at_the_memory_of_a_mask_sees_its_booleans() -> None:
    expected = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2).triu(1)
    mask = WindowMask((1, 1, 3, 5), 2, CPU)
    assert torch.equal(copy.deepcopy(mask), expected)
    assert mask.tolist() == expected.tolist()
    assert (mask.numpy() == expected.numpy()).all()
    assert mask.data_ptr() == mask.untyped_storage().data_ptr() != 0
    assert torch.equal(mask.share_memory_(), expected)
