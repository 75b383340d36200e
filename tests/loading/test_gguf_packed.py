"""A GGUF file's weights in its own blocks: the numbers of the dequantised model, to the bit."""

import os
import time

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

import headwise
from headwise.base.progress import silent
from headwise.errors import LoadError
from headwise.hf.packed import PackedEmbedding, PackedLinear
from headwise.loading.gguf import content
from headwise.loading.gguf.content import known_digest
from loading.gguf_files import SIZES, gguf_tensors, make_stock, write_gguf

WIDE = SIZES | {"hidden_size": 96, "intermediate_size": 160}
# by architecture: the config, and how many products and embeddings stay in blocks
FAMILIES = {
    "llama": (LlamaConfig(**WIDE), 16),
    "qwen2": (Qwen2Config(**WIDE), 16),
    "qwen3": (Qwen3Config(**WIDE | {"head_dim": 16}), 16),
    "gemma2": (Gemma2Config(**WIDE | {"head_dim": 16, "tie_word_embeddings": True}), 16),
    "phi3": (Phi3Config(**WIDE), 10),
    "gpt2": (
        GPT2Config(vocab_size=SIZES["vocab_size"], n_embd=96, n_layer=2, n_head=6, n_positions=128),
        3,
    ),
}


def a_llama():
    return make_stock(LlamaConfig(**WIDE))


def packed_modules(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_that_of_the_dequantised_model(name, kind, tmp_path):
    config, count = FAMILIES[name]
    model, turned = make_stock(config), {}
    if name == "gpt2":  # whose file has its products as nn.Linear does
        products = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        turned = {
            key: tensor.T
            for key, tensor in gguf_tensors(model, name).items()
            if key.endswith(tuple(f"{each}.weight" for each in products))
        }
    file = write_gguf(tmp_path / "m.gguf", model, name, quantized=kind, tensors=turned)
    ours, tokenizer = headwise.load(file, weights="packed", attention="eager")
    stock, _ = headwise.load(file, attention="eager")
    assert len(packed_modules(ours)) == count
    right = stock.state_dict()
    given = ours.state_dict()
    assert given.keys() >= right.keys() - set(stock.all_tied_weights_keys)
    for key, weight in right.items():
        assert torch.equal(given[key], weight), key
    for key, buffer in stock.named_buffers():
        assert torch.equal(ours.get_buffer(key), buffer), key
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, logits = stock(ids).logits, ours(ids).logits
    assert not ours.training
    assert float((logits - expected).norm() / expected.norm()) < 0.05
    headwise.attach(ours)
    ours.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.vocab_size == SIZES["vocab_size"]


def test_a_tied_head_shares_the_blocks_of_the_embedding(tmp_path):
    stock = make_stock(LlamaConfig(**WIDE | {"tie_word_embeddings": True}))
    file = write_gguf(tmp_path / "m.gguf", stock, "llama", quantized="Q8_0")
    model, _ = headwise.load(file, weights="packed")
    assert model.lm_head.packed.data_ptr() == model.model.embed_tokens.packed.data_ptr()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_weights_of_other_types_are_numbers(tmp_path):
    stock = make_stock(LlamaConfig(**WIDE))
    file = write_gguf(tmp_path / "m.gguf", stock, "llama", quantized="BF16")
    model, _ = headwise.load(file, weights="packed", dtype="bfloat16")
    assert not packed_modules(model)
    assert model.dtype == torch.bfloat16
    expected = stock.to(torch.bfloat16).state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected[key]), key


def test_a_second_load_reads_no_gguf(tmp_path, monkeypatch):
    file = write_gguf(
        tmp_path / "m.gguf", make_stock(LlamaConfig(**WIDE)), "llama", quantized="Q4_0"
    )
    os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(content, "_SETTLED_NS", 0)
    first, _ = headwise.load(file, weights="packed")
    monkeypatch.setattr(content, "digest", lambda *given: pytest.fail("the file is read again"))
    second, _ = headwise.load(file, weights="packed")
    for key, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], weight)


def test_a_file_that_changed_is_known_to_have(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_SETTLED_NS", 0)
    file = tmp_path / "m"
    file.write_bytes(b"one")
    one = known_digest(file, silent)
    assert known_digest(file, silent) == one
    stat = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_digest(file, silent) != one


def test_a_file_that_just_changed_is_read_again(tmp_path, monkeypatch):
    """Its times may not tell a second change from the first."""
    file = tmp_path / "m"
    file.write_bytes(b"one")
    one = known_digest(file, silent)
    monkeypatch.setattr(content, "stamp", lambda file: (1, 3, time.time_ns(), time.time_ns()))
    file.write_bytes(b"two")
    assert known_digest(file, silent) != one


def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path):
    make_stock(LlamaConfig(**WIDE)).save_pretrained(tmp_path / "folder")
    with pytest.raises(LoadError, match=r'is for .gguf files.*attach\(model, weights="int8"\)'):
        headwise.load(tmp_path / "folder", weights="packed")
    with pytest.raises(LoadError, match="expected float or packed"):
        headwise.load(tmp_path / "folder", weights="int3")


def test_an_entry_of_another_model_is_refused(tmp_path):
    """Weights that a config does not ask for, or that it asks for and are not there."""
    from headwise.base.tensor_files import write_weights
    from headwise.loading.gguf.packed import PACKED, load_packed
    from headwise.loading.model_folder import ModelFolder
    from headwise.loading.options import LoadOptions

    file = write_gguf(
        tmp_path / "m.gguf", make_stock(LlamaConfig(**WIDE)), "llama", quantized="Q4_0"
    )
    options = LoadOptions(weights="packed")
    opened = ModelFolder.find(file, options)
    write_weights(tmp_path / PACKED, {"model.norm.weight": ("F32", (96,))}, [torch.ones(96)])
    with pytest.raises(LoadError, match="are not of one model"):
        load_packed(tmp_path, opened.config, options)


def test_a_damaged_entry_says_what_to_do(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", a_llama(), "llama", quantized="Q4_0")
    from headwise.loading.gguf.packed import PACKED
    from headwise.loading.gguf.store import converted

    entry = converted(file, weights="packed") / PACKED
    whole = entry.read_bytes()
    turned = whole.replace(b"[160, 3, 18]", b"[ 80, 6, 18]", 1)
    assert turned != whole
    for damaged in (turned, whole[:8] + b"x" * (len(whole) - 8)):
        entry.write_bytes(damaged)
        with pytest.raises(LoadError, match="remove that folder") as caught:
            headwise.load(file, weights="packed")
        assert "\n" not in str(caught.value)
    entry.write_bytes(whole)  # other tests of this run have the same file


def test_damaged_blocks_give_no_numbers_and_no_crash(tmp_path):
    """NaN in one scale: in what is computed with its row, as in the dequantised model."""
    stock = make_stock(LlamaConfig(**WIDE))
    file = write_gguf(tmp_path / "m.gguf", stock, "llama", quantized="Q8_0")
    model, _ = headwise.load(file, weights="packed")
    matrix = model.lm_head.packed.clone()
    matrix[0].view(-1)[:2] = torch.from_numpy(np.float16([np.nan]).view(np.uint8))
    model.lm_head.packed = matrix
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits
    assert logits[..., 0].isnan().all()
    assert not logits[..., 1:].isnan().any()
