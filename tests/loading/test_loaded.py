"""Weights that a folder lacks, has too many of or in another shape are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.methods.decoder import StreamedDecoder
from headwise.errors import LoadError
from headwise.loading.model_folder import ModelFolder
from headwise.viewing.models import open_model
from loading.gguf_files import SIZES, make_stock

LLAMA = SIZES | {"vocab_size": 61}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_stock(hf.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, add: dict[str, tuple[int, ...]], drop: tuple[str, ...] = ()) -> None:
    file = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if name not in drop}
    weights |= {name: torch.ones(shape) for name, shape in add.items()}
    save_file(weights, file, metadata={"format": "pt"})


def read(folder: Path) -> Any:
    return ModelFolder(folder).load(attention="eager")


LEFT = {
    "model.layers.0.self_attn.q_proj.bias": (48,),
    "model.layers.1.self_attn.q_norm.weight": (8,),
    "model.layers.1.mlp.up_proj.bias": (80,),
    "model.layers.2.input_layernorm.weight": (48,),  # a layer more than the config has
    "model.embed_layernorm.weight": (48,),
    "lm_head.bias": (61,),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 48),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_weight_that_the_config_does_not_use_is_named(folder: Path, name: str) -> None:
    change(folder, {name: LEFT[name]})
    with pytest.raises(LoadError) as caught:
        read(folder)
    assert f"not use, first {name}:" in str(caught.value) and "\n" not in str(caught.value)


BESIDE = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.rotary_emb.cos_cached": (128, 8),
    "model.vision_tower.blocks.0.weight": (5, 7),
    "visual.merger.weight": (5, 7),
    "multi_modal_projector.linear.weight": (5, 7),
    "mtp.layers.0.input_layernorm.weight": (48,),
    "score.weight": (2, 48),
    "v_head.summary.weight": (1, 48),
    "model.layers.0.self_attn.k_proj.k_scale": (1,),
}


def test_what_hangs_beside_the_decoder_goes_on_loading(folder: Path) -> None:
    right = read(folder)
    change(folder, BESIDE)
    model, tokens = read(folder), torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, right(tokens).logits)


def test_layers_that_predict_further_tokens_go_on_loading(folder: Path) -> None:
    change(folder, {"model.layers.2.eh_proj.weight": (48, 96)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    read(folder)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_base_models_weights_and_a_tied_head_go_on_loading(tmp_path: Path, prefix: str) -> None:
    stock = make_stock(hf.LlamaConfig(**LLAMA | {"tie_word_embeddings": True}))
    stock.save_pretrained(tmp_path)
    weights = {f"{prefix}{name}": tensor for name, tensor in stock.model.state_dict().items()}
    if prefix:
        weights["lm_head.weight"] = stock.lm_head.weight.detach().clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(read(tmp_path)(tokens).logits, stock(tokens).logits)


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    change(folder, {"model.layers.1.mlp.up_proj.weight": (79, 48)})
    with pytest.raises(LoadError) as caught:
        read(folder)
    assert "model.layers.1.mlp.up_proj.weight of shape [79, 48]" in str(caught.value)
    assert "[80, 48]" in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversion_looks_at_weights_that_it_would_leave_out(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(folder, {name: (48,), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    with pytest.raises(LoadError, match=r"holds 1 weights .* first model\.layers\.0.*q_proj\.bias"):
        StreamedDecoder(Checkpoint(folder))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    config = hf.BertConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=128,
    )
    hf.BertForMaskedLM(config).save_pretrained(tmp_path)  # with a head, without a pooler
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    hf.BertTokenizer(vocab=str(vocab)).save_pretrained(tmp_path)
    return tmp_path


def test_a_view_of_an_encoder_minds_neither_its_head_nor_its_pooler(encoder: Path) -> None:
    open_model(str(encoder))


@pytest.mark.parametrize(
    ("add", "drop", "said"),
    [
        ({}, "bert.embeddings.word_embeddings.weight", "lacks 1 weights .* first embeddings"),
        ({}, "bert.encoder.layer.1.output.dense.bias", "lacks 1 weights .* first encoder.layer.1"),
        ({"bert.encoder.layer.2.output.dense.bias": (48,)}, "", "first bert.encoder.layer.2"),
        ({"bert.embeddings.LayerNorm.bias": (47,)}, "", r"LayerNorm.bias of shape \[47\]"),
    ],
)
def test_a_view_of_an_encoder_names_the_weight_of_a_layer_or_embedding(
    encoder: Path, add: dict[str, tuple[int, ...]], drop: str, said: str
) -> None:
    change(encoder, add, (drop,))
    with pytest.raises(LoadError, match=said):
        open_model(str(encoder))
