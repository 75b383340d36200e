"""`attach(model, weights=...)`: weights rounded on a loaded model, and given back or not."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import headwise
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.packed import PackedEmbedding, PackedLinear
from headwise.ops import format_of, round_blocks, unpack

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}
IDS = torch.arange(1, 22)[None] % 96


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def formats(model):
    return {
        name: format_of(module.packed).name
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_run_on_rounded_weights(weights, dtype):
    model = llama().to(dtype)
    rounded = copy.deepcopy(model)
    report = headwise.attach(model, weights=weights)
    kinds = formats(model)
    assert len(kinds) == 16
    assert {kinds["lm_head"], kinds["model.embed_tokens"]} == {"Q8_0"}
    own = {"int8": "Q8_0", "int4": "Q4_1"}[weights]
    assert {kind for name, kind in kinds.items() if "layers" in name} == {own}
    assert f"rounded to {weights}" in str(report)
    assert "decoder layers of up to 16 rows: 2 of 2" in str(report)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if name in kinds:
                bits = 8 if kinds[name] == "Q8_0" else 4
                module.weight.copy_(unpack(round_blocks(module.weight, bits), dtype))
        expected, given = rounded(IDS).logits.float(), model(IDS).logits.float()
    assert float((given - expected).norm() / expected.norm()) < 0.03
    model.generate(IDS, max_new_tokens=4, do_sample=False)


def test_kept_weights_are_given_back_to_the_bit():
    model = llama(tie_word_embeddings=True)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    headwise.attach(model, weights="int4", keep=True)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    headwise.detach(model)
    assert dict(model.named_modules()) == modules
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)


def test_weights_that_were_not_kept_cannot_be_given_back():
    model = llama()
    headwise.attach(model, weights="int8")
    with torch.no_grad():
        logits = model(IDS).logits
        with pytest.raises(UnsupportedError, match=r'weights="int8".*keep=True'):
            headwise.detach(model)
        assert torch.equal(model(IDS).logits, logits)
    assert formats(model)


def test_another_cache_keeps_the_packed_weights():
    model = llama()
    headwise.attach(model, weights="int8", keep=True)
    blocks = model.lm_head.packed
    assert headwise.attach(model, weights="int8") is headwise.attach(model)
    report = headwise.attach(model, cache="int8")
    assert report.cache != "contiguous"
    assert model.lm_head.packed is blocks
    with pytest.raises(OptionError, match="packed in int8 already"):
        headwise.attach(model, weights="int4")
    headwise.detach(model)
    assert type(model.lm_head) is nn.Linear


def test_an_attached_model_is_packed_later():
    model = llama()
    headwise.attach(model)
    headwise.attach(model, weights="int8", keep=True)
    assert len(formats(model)) == 16
    headwise.detach(model)
    assert not formats(model)
    assert "forward" not in model.lm_head.__dict__


def test_copies_and_pickles_are_packed_and_detach_apart():
    model = llama()
    headwise.attach(model, weights="int8", keep=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(copied(IDS).logits, model(IDS).logits)
        headwise.detach(copied)
        assert not formats(copied)
    assert formats(model)


def test_conv1d_experts_and_routers():
    """GPT-2's products are stored transposed; stacked experts stay; a router is no product."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, eos_token_id=None)
    ).eval()
    with torch.no_grad():
        expected = gpt2(IDS).logits
        headwise.attach(gpt2, weights="int8")
        given = gpt2(IDS).logits
    assert float((given - expected).norm() / expected.norm()) < 0.05
    assert formats(gpt2)["transformer.h.0.attn.c_attn"] == "Q8_0"
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()
    with torch.no_grad():
        expected = mixtral(IDS).logits
        headwise.attach(mixtral, weights="int8")
        given = mixtral(IDS).logits
    assert float((given - expected).norm() / expected.norm()) < 0.1
    assert not any("experts" in name for name in formats(mixtral))


def test_what_cannot_be_packed_stays_and_is_reported():
    model = llama(intermediate_size=90)
    report = headwise.attach(model, weights="int8")
    assert "2 stay: rows that are no multiple of 32" in str(report)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    with torch.no_grad():
        assert model(IDS[:, :3]).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by peft
def test_an_adapter_keeps_its_weights():
    """It would merge into numbers that are made anew each time."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["up_proj"]))
    report = headwise.attach(model, weights="int8")
    assert "2 stay: part of Linear" in str(report)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer) is nn.Linear


def test_bad_requests_change_nothing():
    model = llama()
    with pytest.raises(OptionError, match="expected 'int8' or 'int4'"):
        headwise.attach(model, weights="int3")
    assert "_headwise" not in model.__dict__
    with pytest.raises(OptionError, match="no weights are packed"):
        headwise.attach(model, keep=True)
    headwise.attach(model, weights="int8")
    with pytest.raises(OptionError, match="load it again"):
        headwise.attach(model, weights="int8", keep=True)
    again = copy.deepcopy(model)
    again.__dict__.pop("_headwise")
    with pytest.raises(UnsupportedError, match="packed already"):
        headwise.attach(again, weights="int4")
    odd = llama(hidden_size=40, intermediate_size=90)
    headwise.attach(odd)
    with pytest.raises(UnsupportedError, match="no multiple of 32"):
        headwise.attach(odd, weights="int8")
    assert "_headwise" in odd.__dict__
