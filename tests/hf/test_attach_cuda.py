"""Attached models on a CUDA device, where PyTorch does the work: stock's tokens as well."""

from typing import Any

import pytest
import torch

import headwise
from families import GENERATORS, VOCABULARY, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

_generator = torch.Generator().manual_seed(3)
BATCH = torch.randint(3, VOCABULARY, (3, 19), generator=_generator)
MASK = torch.ones_like(BATCH)
MASK[0, :5] = 0
MASK[1, :11] = 0
BATCH[MASK == 0] = 0


def _generate(model: Any, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"attention_mask": MASK.cuda(), "max_new_tokens": 32, **options}
    return model.generate(BATCH.cuda(), do_sample=False, **given)


def _cached_logits(model: Any) -> torch.Tensor:
    """Of two tokens, one after the other, behind a cached prompt."""
    ids = BATCH[2:].cuda()
    with torch.no_grad():
        first = model(ids[:, :17], use_cache=True)
        cache = first.cache
        parts = [model(ids[:, at : at + 1], cache=cache).logits for at in (17, 18)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", GENERATORS)
def test_an_attached_model_gives_the_tokens_of_stock(family: str) -> None:
    model = make(family).cuda()
    expected = [_generate(model), _generate(model, num_beams=3)]
    headwise.attach(model)
    for given, tokens in zip([_generate(model), _generate(model, num_beams=3)], expected):
        assert torch.equal(given, tokens)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "gpt_oss", "deepseek_v3", "falcon-40b"])
def test_the_caches_are_stock_exactly_or_after_rounding(family: str) -> None:
    model = make(family).cuda()
    tokens, logits = _generate(model), _cached_logits(model)
    for cache in ("paged", "window:200,sinks=4"):
        headwise.attach(model, cache=cache)
        assert torch.equal(_generate(model), tokens), cache
    for cache, error in (("int8", 0.02), ("int4", 0.3)):
        headwise.attach(model, cache=cache)
        assert _generate(model).shape == tokens.shape
        given = _cached_logits(model)
        assert 0 < (given - logits).norm() < error * logits.norm(), cache
