"""What a `Family` says of Transformers' modules, held against those modules."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from headwise.spec import FAMILIES, config_fields, families, family_of

IN_TRANSFORMERS = [
    name
    for name, family in FAMILIES.items()
    if family.in_transformers and not name.startswith("headwise")
]
every_family = pytest.mark.parametrize("name", IN_TRANSFORMERS)


def model_class(name: str) -> type:
    return getattr(transformers, MODEL_MAPPING_NAMES[name])


def test_no_model_type_is_declared_twice() -> None:
    names = [declared.model_type for declared in families._DECLARED]
    assert sorted(names) == sorted(set(names))


def test_stock_falcon_caches_the_heads_that_its_family_says() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_kv_heads": 2}
    for new in (False, True):
        config = FalconConfig(
            **sizes, num_attention_heads=6, new_decoder_architecture=new, multi_query=not new
        )
        model = AutoModelForCausalLM.from_config(config)
        cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
        repeated = FAMILIES["falcon"].stock_kv_heads
        assert repeated is not None
        assert (repeated(config_fields(config)) or 1) == cache.layers[0].keys.shape[1]


def test_t5_has_a_tied_head_whatever_its_config_says() -> None:
    sizes = {"vocab_size": 31, "d_model": 8, "d_ff": 8, "num_layers": 1}
    config = AutoConfig.for_model("t5", **sizes, tie_word_embeddings=False)
    model = transformers.T5ForConditionalGeneration(config)
    assert FAMILIES["t5"].ties_head == (model.lm_head.weight is model.shared.weight)


@every_family
def test_the_classes_of_an_encoder_and_a_decoder_exist(name: str) -> None:
    assert hasattr(transformers, FAMILIES[name].encoder_class)
    decoder = FAMILIES[name].decoder_class
    assert decoder is None or hasattr(transformers, decoder)


def test_a_multimodal_type_is_of_its_text_parts_family() -> None:
    assert family_of("gemma3") is FAMILIES["gemma3_text"]
    assert family_of("paligemma") is None
    assert family_of(None) is None
