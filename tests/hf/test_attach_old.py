"""Families of before the attention interface, without a reader: their own forward is replaced."""

import copy
import pickle
from typing import Any

import pytest
import torch

import headwise
from sweep_families import VOCABULARY, difference, generated, make

OLD = ("mpt", "gpt_neo", "gpt_neox_japanese")
PROMPT = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(6))
every_old = pytest.mark.parametrize("name", OLD)


def _with_dropout(name: str) -> Any:
    model = make(name)
    for module in model.modules():
        for field in ("attn_dropout", "attention_dropout"):
            if isinstance(getattr(module, field, None), torch.nn.Dropout):
                getattr(module, field).p = 0.5
        if hasattr(module, "attn_dropout_p"):
            module.attn_dropout_p = 0.5
    return model.train()


@pytest.mark.parametrize("mode", ["left-padded batch", "static cache"])
@every_old
def test_generates_the_tokens_and_logits_of_stock(name: str, mode: str) -> None:
    model = make(name)
    expected = generated(model, mode)
    headwise.attach(model, strict=True)
    assert difference(expected, generated(model, mode)) == ("", False)


def test_mpt_with_a_scale_and_clipped_projections_is_stocks() -> None:
    model = make("mpt")
    for block in model.transformer.blocks:
        block.attn.clip_qkv, block.attn.softmax_scale = 0.7, 0.11
    expected = generated(model, "left-padded batch")
    headwise.attach(model)
    assert difference(expected, generated(model, "left-padded batch")) == ("", False)


@every_old
def test_weights_are_given_where_they_are_asked_for(name: str) -> None:
    model, mask = make(name), torch.ones_like(PROMPT)
    mask[0, :9] = 0
    inputs = {"input_ids": PROMPT, "attention_mask": mask, "output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs).attentions
        headwise.attach(model)
        given = model(**inputs).attentions
    for ours, stock in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


@every_old
def test_a_left_padded_loss_and_its_gradients_are_those_of_stock(name: str) -> None:
    model, mask, labels = make(name), torch.ones_like(PROMPT), PROMPT.clone()
    mask[0, :9] = 0
    labels[0, :9] = -100  # the last token of padding is to predict the first one of the text

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(PROMPT, attention_mask=mask, labels=labels).loss
        loss.backward()
        grads = [at.grad.clone() for at in model.parameters() if at.grad is not None]
        return [loss.detach(), *grads]

    expected = run()
    headwise.attach(model)
    for ours, stock in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-4 * float(stock.abs().max()) + 1e-7, rtol=0)


@every_old
def test_dropout_in_training_is_stocks(name: str) -> None:
    model = _with_dropout(name)

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return model(PROMPT, use_cache=False).logits

    expected = run()
    headwise.attach(model)
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)


@every_old
def test_copies_and_pickles_and_is_detached(name: str) -> None:
    model = make(name)
    before = {key: set(at.__dict__) for key, at in model.named_modules()}
    expected = generated(model, "prompt")
    headwise.attach(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert difference(expected, generated(twin, "prompt")) == ("", False)
    for each in (model, twin):
        headwise.detach(each)
        assert difference(expected, generated(each, "prompt")) == ("", False)
    assert {key: set(at.__dict__) for key, at in model.named_modules()} == before


@every_old
def test_its_own_cache_holds_what_is_asked_for(name: str) -> None:
    model = make(name)
    report = headwise.attach(model, cache="paged:16")
    assert {layer.cache for layer in report.layers} == {"paged:16"}
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).cache
    assert {type(layer).__name__ for layer in cache.layers} == {"ViewLayer"}
