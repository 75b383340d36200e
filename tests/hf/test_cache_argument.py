"""A cache is handed to a model once, under one name; Transformers' warnings are errors here."""

import pytest
import torch

import headwise
from families import GENERATORS, make
from headwise.hf.cache_layers import OwnLayer
from headwise.hf.stock_names import CACHE

IDS = torch.tensor([[5, 7, 11]])


@pytest.mark.parametrize("family", GENERATORS)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_where_the_caller_says_none_there_is_one_cache(family: str, name: str) -> None:
    model = make(family)
    headwise.attach(model)
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        made = model(IDS, use_cache=True, **{name: None}, **inputs)[CACHE]
    held = made.self_attention_cache if model.config.is_encoder_decoder else made
    assert any(isinstance(layer, OwnLayer) for layer in held.layers)
