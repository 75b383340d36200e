"""Modules with packed weights in a model of Transformers: what works, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import headwise
from headwise.errors import UnsupportedError
from headwise.generation.chunks import chunk_size
from headwise.hf.packed import PackedEmbedding, PackedLinear, holders, put_packed
from headwise.hf.stock_names import CACHE
from headwise.ops import pack, round_blocks, unpack
from packed_blocks import IDS, SIZES, random_blocks


def models(dtype=torch.float32, **changes):
    """A model with packed weights, and the same with the numbers that those stand for."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).to(dtype).eval()
    packed = {name: round_blocks(holder.weight, 8) for name, holder in holders(stock).items()}
    ours = copy.deepcopy(stock)
    put_packed(ours, packed, dtype)
    numbers = {name: unpack(matrix, dtype) for name, matrix in packed.items()}
    stock.load_state_dict(numbers, strict=False)
    return ours, stock


def far(given, expected):
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_packed_weights_computes_nearly_what_its_numbers_do(dtype):
    ours, stock = models(dtype)
    few = IDS[:1, :9]  # of more rows processors with AMX multiply the numbers
    with torch.no_grad():
        given, expected = ours(few).logits, stock(few).logits
    assert given.dtype == dtype
    # x is rounded to 8 bits before each product
    assert 0 < far(given.float(), expected.float()) < 0.03


def test_a_prompt_is_read_in_larger_chunks_where_each_makes_numbers(monkeypatch):
    ours, stock = models()
    for model in (ours, stock):
        headwise.attach(model)
    assert chunk_size(stock) == chunk_size(ours) == 512  # float32 is multiplied as integers
    monkeypatch.setattr("headwise.hf.packed.modules.faster", lambda *_: None)
    assert (chunk_size(stock), chunk_size(ours)) == (512, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_runs_its_layers_fused_with_the_same_tokens(dtype):
    ours, _ = models(dtype)
    before = ours.generate(IDS, max_new_tokens=12, do_sample=False)
    report = headwise.attach(ours)
    assert any("packed weights: 16 modules in Q8_0" in line for line in report.step)
    assert any("decoder layers of up to 16 rows: 2 of 2" in line for line in report.step)
    torch.testing.assert_close(ours.generate(IDS, max_new_tokens=12, do_sample=False), before)
    headwise.detach(ours)
    assert torch.equal(ours.generate(IDS, max_new_tokens=12, do_sample=False), before)


def test_formats_may_differ_from_layer_to_layer_and_within_one():
    ours, _ = models(hidden_size=256, intermediate_size=512)
    for number, layer in enumerate(ours.model.layers):
        for path, name in [
            ("self_attn.v_proj", "Q6_K"),
            ("mlp.down_proj", ("Q4_K", "Q5_1")[number]),
            ("mlp.gate_proj", "Q5_K"),
        ]:
            place = layer.get_submodule(path)
            blocks = place.in_features // (32 if name == "Q5_1" else 256)
            matrix = pack(random_blocks(name, place.out_features, blocks))
            layer.set_submodule(path, PackedLinear(matrix, None, torch.float32).eval())
    with torch.no_grad():
        expected = ours(IDS).logits
        report = headwise.attach(ours)
        assert any("decoder layers of up to 16 rows: 2 of 2" in line for line in report.step)
        cache = getattr(ours(IDS[:, :18], use_cache=True), CACHE)
        given = ours(IDS[:, 18:], **{CACHE: cache}).logits
    assert far(given, expected[:, 18:]) < 0.02


def test_what_is_saved_is_an_ordinary_checkpoint(tmp_path):
    for tied in (False, True):
        ours, stock = models(tie_word_embeddings=tied)
        ours.save_pretrained(tmp_path / str(tied))
        read = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float32)
        for name, weight in stock.state_dict().items():
            assert torch.equal(read.state_dict()[name], weight), name


def test_copies_and_pickles_have_the_same_blocks():
    ours, _ = models()
    headwise.attach(ours)
    with torch.no_grad():
        expected = ours(IDS).logits
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(copied(IDS).logits, expected)
            own = copied.model.layers[0].mlp.up_proj.packed
            assert own.data_ptr() != ours.model.layers[0].mlp.up_proj.packed.data_ptr()
    stream = io.BytesIO()
    torch.save(ours.state_dict(), stream)


def test_it_follows_the_models_dtype():
    ours, stock = models()
    ours, stock = ours.to(torch.bfloat16), stock.to(torch.bfloat16)
    assert ours.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert torch.equal(ours.model.embed_tokens(IDS), stock.model.embed_tokens(IDS))
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)
    assert ours(IDS).logits.dtype == torch.bfloat16


def test_writes_are_refused_and_nothing_is_lost():
    ours, stock = models()
    module = ours.model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match="inference tensor"):
        module.weight.add_(1)
    for value in (torch.nn.Parameter(torch.zeros(96, 64)), torch.zeros(96, 64)):
        with pytest.raises(UnsupportedError, match='weights="float"'):
            module.weight = value
    with pytest.raises(RuntimeError, match=r"up_proj.weight is packed .*weights=\"float\""):
        ours.load_state_dict(stock.state_dict())
    with pytest.raises(ValueError, match="PackedLinear"):
        get_peft_model(ours, LoraConfig(target_modules=["up_proj"]))
    assert torch.equal(module.weight, stock.model.layers[0].mlp.up_proj.weight)


def test_gradients_go_through_and_nothing_packed_is_trained():
    ours, stock = models(attention_bias=True)
    ours.train(), stock.train()
    assert {name for name, _ in ours.named_parameters()} < {n for n, _ in stock.named_parameters()}
    for model in (ours, stock):
        model(IDS, labels=IDS).loss.backward()
    right = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name].grad, atol=1e-5, rtol=1e-3)


def test_without_kernels_it_is_the_product_with_its_numbers(monkeypatch):
    module = PackedLinear(pack(random_blocks("Q6_K", 40, 1)), None, torch.float32)
    x = torch.randn(3, 256)
    monkeypatch.setattr("headwise.ops.packed.operator.faster", lambda *given: None)
    assert torch.equal(module(x), functional.linear(x, module.weight))


def test_what_is_compiled_multiplies_the_blocks():
    ours, _ = models()
    compiled = torch.compile(ours.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours.model.layers[0].mlp(x), atol=2e-3, rtol=1e-2)
        embedding = torch.compile(ours.model.embed_tokens, fullgraph=True, backend="aot_eager")
        assert torch.equal(embedding(IDS), ours.model.embed_tokens(IDS))


def test_an_embedding_gives_its_rows_and_refuses_others():
    module = PackedEmbedding(pack(random_blocks("Q4_1", 40, 2)), None, torch.float32)
    ids = torch.tensor([[0, 39, 17], [3, 3, 16]])
    assert torch.equal(module(ids), functional.embedding(ids, module.weight))
    assert module(ids[:0]).shape == (0, 3, 64)
    for wrong in (40, -1):
        with pytest.raises(IndexError, match="expected 0 to 39"):
            module(torch.tensor([wrong]))


def test_modules_print_what_they_are():
    ours, _ = models()
    assert "PackedLinear(64, 96, format=Q8_0)" in str(ours)
