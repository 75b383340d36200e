"""`attach(model, weights=...)`: weights rounded on a loaded model, and given back or not."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import headwise
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.packed import PackedEmbedding, PackedLinear
from headwise.ops import format_of, round_blocks, unpack
from packed_blocks import IDS, SIZES


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
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_adapters_and_what_they_are_on_stay_as_they_are(more):
    """They are trained, and merged into numbers that a packed weight would make anew each time."""
    model = get_peft_model(llama(), LoraConfig(r=32, target_modules=["up_proj"], **more))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    report = headwise.attach(model, weights="int4")
    assert "part of Linear, a class of peft" in str(report)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer) is nn.Linear
    assert not any("lora" in name or "modules_to_save" in name for name in formats(model))


def test_conv1d_is_saved_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4)).eval()
    before = copy.deepcopy(model.state_dict())
    headwise.attach(model, weights="int8")
    model.save_pretrained(tmp_path)
    read = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    for name, weight in before.items():
        torch.testing.assert_close(read[name], weight, atol=2e-3, rtol=0)
    attention = model.transformer.h[0].attn
    assert torch.equal(attention.c_proj.weight, read["transformer.h.0.attn.c_proj.weight"])


def test_what_fails_later_leaves_model_and_weights_as_they_were():
    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    model = Lfm2ForCausalLM(config).eval()
    headwise.attach(model, weights="int8", keep=True)
    with torch.no_grad():
        logits = model(IDS).logits
        with pytest.raises(UnsupportedError, match="strict=True"):
            headwise.attach(model, cache="paged", strict=True)
        assert torch.equal(model(IDS).logits, logits)
    headwise.detach(model)
    assert not formats(model)


def test_an_interrupt_leaves_nothing_packed(monkeypatch):
    model, calls = llama(), iter([*range(4), KeyboardInterrupt])

    def interrupted(*given):
        if next(calls) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return round_blocks(*given)

    monkeypatch.setattr("headwise.hf.packed.packing.round_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        headwise.attach(model, weights="int8")
    assert not formats(model)
    assert "_headwise" not in model.__dict__


def test_layers_that_were_moved_get_their_own_weights_back():
    model = llama(num_hidden_layers=3)
    layers = list(model.model.layers)
    own = [layer.mlp.up_proj for layer in layers]
    headwise.attach(model, weights="int8", keep=True)
    model.model.layers = nn.ModuleList([layers[2], layers[1]])
    headwise.detach(model)
    assert [layer.mlp.up_proj for layer in model.model.layers] == [own[2], own[1]]


def test_weights_that_are_given_back_follow_the_models_dtype():
    model = llama(attention_bias=True)
    expected = copy.deepcopy(model).to(torch.bfloat16)
    headwise.attach(model, weights="int8", keep=True)
    model.to(torch.bfloat16)
    headwise.detach(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_module_with_two_names_is_packed_once():
    model = llama()
    layers = model.model.layers
    layers[1].mlp.up_proj = shared = layers[0].mlp.up_proj
    report = headwise.attach(model, weights="int8", keep=True)
    assert layers[0].mlp.up_proj is layers[1].mlp.up_proj
    assert "decoder layers of up to 16 rows: 2 of 2" in str(report)
    headwise.detach(model)
    assert layers[0].mlp.up_proj is layers[1].mlp.up_proj is shared


@pytest.mark.parametrize("size", [1e7, 1e-7, float("nan"), float("inf")])
def test_numbers_that_blocks_cannot_hold_stay(size):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(size)
    report = headwise.attach(model, weights="int8")
    assert "whose scales float16 does not hold" in str(report)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_what_decides_has_8_bits_and_other_classes_are_named():
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()
    headwise.attach(model, weights="int4")
    assert formats(model)["score"] == "Q8_0"
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    assert "a class of its own, FalconLinear" in str(headwise.attach(falcon, weights="int8"))
    odd = llama()
    odd.model.embed_tokens.max_norm = 1.0
    assert "1 stay: an embedding with max_norm" in str(headwise.attach(odd, weights="int8"))


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
