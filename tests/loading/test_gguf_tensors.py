"""Every tensor of a GGUF file is used and every weight filled, or the file is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from headwise.errors import LoadError
from headwise.loading.gguf.conversion import float32_bytes, read_config
from headwise.loading.gguf.store import converted
from headwise.loading.load import load
from loading.gguf_files import SIZES, gguf_tensors, make_stock, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_stock(hf.LlamaConfig(**SIZES))


def refusal(file: Path, cache: Path) -> str:
    with pytest.raises(LoadError) as caught:
        converted(file)
    assert not [path for path in cache.glob("*") if path.is_dir()]
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"],
)
def test_a_tensor_that_lacks_is_named(llama: Any, tmp_path: Path, cache: Path, name: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", drop=(name,))
    assert f"lacks {name}" in refusal(file, cache)


def test_the_first_lacking_block_is_named(llama: Any, tmp_path: Path, cache: Path) -> None:
    last = tuple(name for name in gguf_tensors(llama, "llama") if name.startswith("blk.1."))
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", drop=last)
    assert "lacks 1 of its 2 blocks, first blk.1" in refusal(file, cache)


def test_a_damaged_count_of_blocks_asks_for_no_memory(
    llama: Any, tmp_path: Path, cache: Path
) -> None:
    fields = {"block_count": 2**32 - 1}
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", fields=fields)
    assert "blocks, first blk.2" in refusal(file, cache)


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_of_a_split_model_says_how_to_join(
    llama: Any, tmp_path: Path, cache: Path, number: int
) -> None:
    keys = {"split.no": number - 1, "split.count": 2, "split.tensors.count": 21}
    names = list(gguf_tensors(llama, "llama"))
    drop = tuple(names[9:] if number == 1 else names[:9])
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", keys=keys, drop=drop)
    assert f"is file {number} of 2 of a split model; join them" in refusal(file, cache)


def test_a_later_file_without_any_other_field_is_one_of_a_split_model(
    tmp_path: Path, cache: Path
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    del writer.kv_data[0]["general.architecture"]  # llama-gguf-split leaves it out
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("output.weight", np.ones((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is file 3 of 3 of a split model" in refusal(tmp_path / "model.gguf", cache)


EXTRA = {
    "blk.0.attn_q.bias": (48,),  # without those of key, value and output Llama has no place for it
    "blk.0.attn_q_norm.weight": (8,),
    "blk.1.ffn_gate_inp.weight": (4, 48),
    "blk.2.attn_norm.weight": (48,),
    "blk.1.attn_sinks.weight": (6,),
    "token_embd_norm.weight": (48,),
    "output.bias": (258,),
    "something.weight": (3,),
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_tensor_that_is_left_over_is_named(
    llama: Any, tmp_path: Path, cache: Path, name: str
) -> None:
    extra = {name: np.ones(EXTRA[name], np.float32)}
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", tensors=extra)
    assert f"holds {name}, " in refusal(file, cache)


def test_what_sees_or_hears_beside_the_decoder_is_passed_over(llama: Any, tmp_path: Path) -> None:
    beside = {"v.patch_embd.weight": (5, 7), "mm.0.weight": (48, 5), "a.conv1d.1.bias": (3,)}
    file = write_gguf(
        tmp_path / "model.gguf",
        llama,
        "llama",
        fields={"vision.block_count": 1, "mm.tokens_per_image": 256},
        tensors={name: np.ones(shape, np.float32) for name, shape in beside.items()},
    )
    model, _ = load(file, attention="eager")
    tokens = torch.arange(7, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)


def test_the_config_of_the_first_of_several_files_can_be_read(llama: Any, tmp_path: Path) -> None:
    keys = {"split.no": 0, "split.count": 2, "split.tensors.count": 21}
    drop = tuple(list(gguf_tensors(llama, "llama"))[9:])
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", keys=keys, drop=drop)
    assert read_config(file)["num_hidden_layers"] == 2  # which is all that a plan asks for


def test_a_tensor_of_another_size_is_named(llama: Any, tmp_path: Path, cache: Path) -> None:
    wrong = {"blk.1.ffn_up.weight": np.ones((80, 47), np.float32)}
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", tensors=wrong)
    text = refusal(file, cache)
    assert "blk.1.ffn_up.weight [80, 47]" in text and "[80, 48]" in text


def test_experts_without_their_other_half_are_refused(tmp_path: Path, cache: Path) -> None:
    config = hf.Qwen3MoeConfig(
        **SIZES, head_dim=10, moe_intermediate_size=28, num_experts=5, num_experts_per_tok=2
    )
    fields = {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 28}
    file = write_gguf(
        tmp_path / "model.gguf",
        make_stock(config),
        "qwen3moe",
        fields=fields,
        drop=("blk.0.ffn_up_exps.weight",),
    )
    assert "blk.0.ffn_gate_exps.weight [5, 28, 48]" in refusal(file, cache)


def test_an_output_of_its_own_is_used_where_the_architecture_is_mostly_tied(
    tmp_path: Path,
) -> None:
    config = hf.FalconConfig(
        vocab_size=258,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    stock = make_stock(config)
    fields = {"attention.head_count_kv": 1}
    file = write_gguf(tmp_path / "model.gguf", stock, "falcon", fields=fields)
    model, _ = load(file, attention="eager")
    tokens = torch.arange(7, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock(tokens).logits)


def test_a_projector_or_adapter_is_no_language_model(llama: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama, "llama", keys={"general.type": "mmproj"})
    with pytest.raises(LoadError, match=r"is not a language model \(general\.type 'mmproj'\)"):
        float32_bytes(file)
