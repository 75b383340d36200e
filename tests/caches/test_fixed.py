"""`fixed:N`: one buffer of N tokens; a full one is a CapacityError and stays as it is."""

import pytest
import torch

import headwise
from families import make
from headwise.caches import CacheChoice
from headwise.caches.fixed import FixedCache
from headwise.errors import CapacityError, OptionError


def test_a_full_cache_raises_and_keeps_what_it_has() -> None:
    cache = FixedCache(5)
    rows = torch.randn(1, 3, 4, 7), torch.randn(1, 3, 4, 2)
    key, value = cache.append(*rows)
    with pytest.raises(CapacityError, match=r"holds 5 tokens .* and 8 are needed"):
        cache.append(*rows)
    assert torch.equal(cache.first, rows[0])
    assert torch.equal(value, rows[1])
    cache.append(rows[0][:, :, :1], rows[1][:, :, :1])
    assert (cache.length, cache.capacity) == (5, 5)
    cache.crop(2)
    cache.append(rows[0][:, :, :3], rows[1][:, :, :3])
    assert torch.equal(cache.first, torch.cat([rows[0][:, :, :2], rows[0][:, :, :3]], 2))
    assert torch.equal(key, rows[0])


def test_it_is_chosen_by_name() -> None:
    assert str(CacheChoice.parse("fixed:9")) == "fixed:9"
    assert CacheChoice.parse("fixed:9").make().name == "fixed:9"
    for wrong in ("fixed", "fixed:0", "fixed:9,sinks=1"):
        with pytest.raises(OptionError, match="cache is"):
            CacheChoice.parse(wrong)


def test_an_attached_model_generates_until_it_is_full() -> None:
    model = make("llama-gqa")
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    report = headwise.attach(model, cache="fixed:12")
    assert "one buffer of 12 tokens" in str(report)
    assert report.layers[0].cache == "fixed:12"
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    with pytest.raises(CapacityError, match="holds 12 tokens"):
        model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
