"""Families that stock runs eagerly only and that have no reader: their eager function is asked."""

import copy
import pickle
from typing import Any

import pytest
import torch

import headwise
from older_stock import needs
from sweep_families import VOCABULARY, difference, generated, make

modeling_flint = pytest.importorskip(
    "transformers.models.flint.modeling_flint", reason="Transformers is older than these families"
)

# sinks by the softmax, sinks by the log-sum-exp, a softcap, sinks in some layers, sinks per query
_INKLING2 = needs("5.23", "Inkling 2")
UNREAD = (
    *("flint", "granite_swa", "vaultgemma", "mimo_v2_flash"),
    pytest.param("inkling2_text", marks=_INKLING2),
)
PROMPT = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(6))
MASK = torch.ones_like(PROMPT)
MASK[0, :9] = 0


@pytest.mark.parametrize("mode", ["prompt", "left-padded batch"])
@pytest.mark.parametrize("name", [*UNREAD[-2:], "bigbird_pegasus"])
def test_generates_the_tokens_and_logits_of_stock(name: str, mode: str) -> None:
    # the decoder of bigbird_pegasus says that it is not causal: its mask always comes
    model = make(name)
    expected = generated(model, mode)
    headwise.attach(model)
    assert difference(expected, generated(model, mode)) == ("", False)


@pytest.mark.parametrize("name", UNREAD)
def test_weights_and_gradients_are_those_of_stock(name: str) -> None:
    model = make(name)
    inputs = {"input_ids": PROMPT, "attention_mask": MASK, "use_cache": False}

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(**inputs, output_attentions=True)
        output.logits[MASK.bool()].square().mean().backward()
        grads = [at.grad.clone() for at in model.parameters() if at.grad is not None]
        # rows of padding see nothing
        rows = [at.detach().transpose(1, 2)[MASK.bool()] for at in output.attentions]
        return [*rows, *grads]

    expected = run()
    headwise.attach(model)
    for ours, stock in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-4 * float(stock.abs().max()) + 1e-6, rtol=0)


@_INKLING2
def test_dropout_with_sinks_per_query_is_stocks() -> None:
    model = make("inkling2_text").train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return model(PROMPT, attention_mask=MASK, use_cache=False).logits[MASK.bool()]

    expected = run()
    headwise.attach(model)
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)


def test_attaching_draws_no_random_number_and_writes_to_no_parameter() -> None:
    model = make("flint")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    headwise.attach(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(at, before[name]) for name, at in model.state_dict().items())


def test_an_attached_model_copies_pickles_and_is_detached() -> None:
    model = make("flint")
    expected = generated(model, "prompt")
    headwise.attach(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert difference(expected, generated(twin, "prompt")) == ("", False)
    headwise.detach(model)
    assert model.config._attn_implementation == "eager"
    assert difference(expected, generated(model, "prompt")) == ("", False)


def test_loaded_by_name_it_is_refused() -> None:
    model = make("flint")
    model.set_attn_implementation("headwise")
    with pytest.raises(headwise.UnsupportedError, match="flint, which has no spec reader"):
        model(PROMPT)


STOCK = modeling_flint.eager_attention_forward


def _warmer(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **rest: Any) -> Any:
    return STOCK(module, query * module.head_dim, key, value, attention_mask, **rest)


def _tempered(module: Any, query: Any, key: Any, value: Any, temperature: Any, **rest: Any) -> Any:
    return STOCK(module, query, key, value, **rest)


@pytest.mark.parametrize(
    ("eager", "message"),
    [
        (_warmer, "eager attention gives something else"),
        (_tempered, "eager attention takes temperature, which headwise does not"),
    ],
)
def test_what_the_eager_function_does_besides_is_refused(
    eager: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_flint, "eager_attention_forward", eager)
    model = make("flint")
    with pytest.raises(headwise.UnsupportedError, match=message) as error:
        headwise.attach(model)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("git", "GitAttention, is not on the attention interface"),
        ("mamba", "only states, which headwise does not run"),
        ("deepseek_v4", "tokens that an indexer chooses"),
    ],
)
def test_what_is_refused_is_refused_with_its_reason(name: str, reason: str) -> None:
    with pytest.raises(headwise.UnsupportedError, match=reason) as error:
        headwise.attach(make(name))
    assert "\n" not in str(error.value)


def test_of_a_model_whose_tower_is_off_the_interface_the_rest_is_attached() -> None:
    model = make("got_ocr2")
    expected = generated(model, "prompt")
    report = headwise.attach(model)
    assert difference(expected, generated(model, "prompt")) == ("", False)
    assert [layer.name for layer in report.layers if layer.stock] == ["model.vision_tower"]
    assert model.model.language_model.config._attn_implementation == "headwise"


def test_a_module_of_a_notebook_in_such_a_model_is_looked_through() -> None:
    class Around(torch.nn.Sequential):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden)

    Around.__qualname__, Around.__module__ = "Around", "__main__"  # whose file does not have it
    model = make("vaultgemma")
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp)
    expected = generated(model, "prompt")
    headwise.attach(model)
    assert difference(expected, generated(model, "prompt")) == ("", False)
