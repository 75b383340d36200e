"""Models loaded with attn_implementation="headwise": our attention on Transformers' caches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicLayer

import headwise
from families import ENCODERS, GENERATORS, OWN_FORWARD, VOCABULARY, make
from headwise.hf.module_hook import NAME

IDS = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
ON_THE_INTERFACE = [name for name in (*GENERATORS, *ENCODERS) if name not in OWN_FORWARD]


def _tokens(model: Any) -> torch.Tensor:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("family", [name for name in GENERATORS if name not in OWN_FORWARD])
def test_gives_the_tokens_of_stock(family: str) -> None:
    expected = _tokens(make(family))
    model = make(family, attn_implementation="headwise")
    assert model.config.get_text_config(decoder=True)._attn_implementation == NAME
    assert torch.equal(_tokens(model), expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_encodes_as_stock(family: str) -> None:
    with torch.no_grad():
        expected = make(family)(IDS, attention_mask=MASK)[0][MASK.bool()]
        given = make(family, attn_implementation="headwise")(IDS, attention_mask=MASK)[0]
    torch.testing.assert_close(given[MASK.bool()], expected, rtol=0, atol=1e-4)


def test_a_saved_model_is_loaded_by_name_and_keeps_transformers_cache(tmp_path: Path) -> None:
    stock = make("deepseek_v3")
    stock.save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="headwise")
    layer, expected = (each(IDS).past_key_values.layers[0] for each in (model, stock))
    assert type(layer) is DynamicLayer
    torch.testing.assert_close((layer.keys, layer.values), (expected.keys, expected.values))


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "gemma3", "t5"])
def test_is_attached_and_detached_like_any_other(family: str) -> None:
    model = make(family, attn_implementation="headwise")
    expected = _tokens(model)
    report = headwise.attach(model, cache="paged")
    assert any(layer.cache.startswith("paged") for layer in report.layers)
    assert torch.equal(_tokens(model), expected)
    headwise.detach(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(_tokens(model), expected)


@pytest.mark.parametrize("family", OWN_FORWARD)
def test_falcon_and_bloom_are_refused_in_one_line(family: str) -> None:
    with pytest.raises(headwise.UnsupportedError, match=r"headwise\.attach\(model\)") as error:
        make(family, attn_implementation="headwise")(IDS)
    assert "\n" not in str(error.value)


def test_a_bloom_that_was_loaded_by_name_is_not_attached() -> None:
    model = make("bloom", attn_implementation="headwise")
    with pytest.raises(headwise.UnsupportedError, match="load it without, then attach it"):
        headwise.attach(model)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (
            hf.XGLMForCausalLM,
            hf.XGLMConfig(vocab_size=97, d_model=48, ffn_dim=50, num_layers=2, attention_heads=6),
            "xglm, which does not take its attention from Transformers' attention interface",
        ),
        (
            hf.SplinterModel,
            hf.SplinterConfig(
                vocab_size=97,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=6,
                intermediate_size=64,
            ),
            "splinter, which has no spec reader, and no SDPA in Transformers either",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(model_class: Any, config: Any, message: str) -> None:
    model = model_class._from_config(config, attn_implementation="headwise").eval()
    for each in (model, torch.compile(model, backend="eager")):
        with torch.no_grad(), pytest.raises(Exception, match=message):
            each(IDS, attention_mask=MASK)


def test_a_decoder_that_looks_its_class_up_by_name_is_refused_when_it_is_made() -> None:
    config = hf.GPTNeoConfig(
        vocab_size=99,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    )
    with pytest.raises(headwise.UnsupportedError, match="not for gpt_neo, which does not take"):
        hf.GPTNeoForCausalLM._from_config(config, attn_implementation="headwise")


def test_a_compiler_runs_it_in_one_graph() -> None:
    torch._dynamo.reset()
    expected = make("llama-gqa")(IDS, attention_mask=MASK).logits[MASK.bool()]
    model = make("llama-gqa", attn_implementation="headwise")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = compiled(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
