"""Which weights are rows of a GGUF file, and all others: to the bit what Transformers reads."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

from headwise.errors import LoadError
from headwise.loading.gguf.config import gguf_config
from headwise.loading.gguf.file import GgufFile, read_header
from headwise.loading.gguf.q5 import teach_q5
from headwise.loading.gguf.rows import StoredRows, stored_rows
from headwise.loading.gguf.stock_reader import float_weights
from headwise.loading.source import demo_model
from loading.gguf_files import SIZES, gguf_tensors, make_stock, write_gguf

# Rows of whole blocks of 32; a layer whose projections are square, so that a transposed one fits.
BLOCKS = SIZES | {"hidden_size": 96, "intermediate_size": 160}
TIED = BLOCKS | {"tie_word_embeddings": True}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
EXPERT_FIELDS = {
    "expert_count": 5,
    "expert_used_count": 2,
    "expert_feed_forward_length": 64,
}
SHARED = EXPERT_FIELDS | {"expert_shared_feed_forward_length": 128}
GPT2: dict[str, Any] = {
    "vocab_size": BLOCKS["vocab_size"],
    "n_embd": 96,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
BLOOM = {key: value for key, value in TIED.items() if "heads" not in key}
BLOOM["n_head"] = 6
LFM2 = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
HYBRID_FIELDS = {
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
    "rope.dimension_sections": [2, 1, 1, 0],
}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", hf.LlamaConfig(**BLOCKS, attention_bias=True, mlp_bias=True), {}),
    "llama, tied": ("llama", hf.LlamaConfig(**TIED), {}),
    "qwen2": ("qwen2", hf.Qwen2Config(**BLOCKS), {}),
    "qwen3": ("qwen3", hf.Qwen3Config(**BLOCKS, head_dim=32), {}),
    "gemma2": ("gemma2", hf.Gemma2Config(**TIED, head_dim=16, query_pre_attn_scalar=16), {}),
    "gemma3": ("gemma3", hf.Gemma3TextConfig(**TIED, head_dim=16, query_pre_attn_scalar=16), {}),
    "phi3": ("phi3", hf.Phi3Config(**BLOCKS), {}),
    "gpt2": ("gpt2", hf.GPT2Config(**GPT2), {}),
    "bloom": ("bloom", hf.BloomConfig(**BLOOM), {}),
    "falcon": (
        "falcon",
        hf.FalconConfig(**TIED, ffn_hidden_size=160),
        {"fields": {"attention.head_count_kv": 1}},
    ),
    "nemotron": (
        "nemotron",
        hf.NemotronConfig(**BLOCKS),
        {"fields": {"attention.layer_norm_rms_epsilon": 1e-5}},
    ),
    "stablelm": (
        "stablelm",
        hf.StableLmConfig(**BLOCKS),
        {"fields": {"use_parallel_residual": False}},
    ),
    "starcoder2": ("starcoder2", hf.Starcoder2Config(**BLOCKS, sliding_window=None), {}),
    "qwen2moe": (
        "qwen2moe",
        hf.Qwen2MoeConfig(**BLOCKS, **EXPERTS, shared_expert_intermediate_size=128),
        {"fields": SHARED},
    ),
    "qwen3moe": (
        "qwen3moe",
        hf.Qwen3MoeConfig(**BLOCKS, **EXPERTS, head_dim=16),
        {"fields": EXPERT_FIELDS},
    ),
    "minimax-m2": (
        "minimax-m2",
        hf.MiniMaxM2Config(**BLOCKS, num_local_experts=5, num_experts_per_tok=2, head_dim=16),
        {"fields": EXPERT_FIELDS},
    ),
    "lfm2": (
        "lfm2",
        hf.Lfm2Config(**BLOCKS, **LFM2),
        {
            "fields": {
                "attention.head_count_kv": [0, 2],
                "attention.layer_norm_rms_epsilon": 1e-5,
                "shortconv.l_cache": 3,
            }
        },
    ),
    "qwen35": ("qwen35", hf.Qwen3_5TextConfig(**BLOCKS, **HYBRID), {"fields": HYBRID_FIELDS}),
    "qwen35moe": (
        "qwen35moe",
        hf.Qwen3_5MoeTextConfig(**BLOCKS, **HYBRID, **EXPERTS, shared_expert_intermediate_size=128),
        {"fields": HYBRID_FIELDS | SHARED},
    ),
}

# Of each case the weights of more than one dim that are not rows of the file, and those whose rows
# are in another order; without the number of their layer.
GPT2_LAYERS = {
    f"transformer.h.{name}.weight"
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}
LINEAR = "model.layers.linear_attn"
JOINED = "model.layers.mlp.experts.gate_up_proj"
OTHERS = {
    "gpt2": GPT2_LAYERS,
    "lfm2": {"model.layers.conv.conv.weight"},
    "minimax-m2": {JOINED},
    "qwen2moe": {JOINED, "model.layers.mlp.shared_expert_gate.weight"},
    "qwen3moe": {JOINED},
    "qwen35": {f"{LINEAR}.conv1d.weight", f"{LINEAR}.out_proj.weight"},
    "qwen35moe": {
        JOINED,
        "model.layers.mlp.shared_expert_gate.weight",
        f"{LINEAR}.conv1d.weight",
        f"{LINEAR}.out_proj.weight",
    },
}
LLAMA = {"model.layers.self_attn.q_proj.weight", "model.layers.self_attn.k_proj.weight"}
VALUES = {f"{LINEAR}.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")}
PERMUTED = {
    "llama": LLAMA,
    "llama, tied": LLAMA,
    "bloom": {"transformer.h.self_attention.query_key_value.weight"},
    "qwen35": VALUES,
    "qwen35moe": VALUES,
}


def meta_model(file: GgufFile) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(gguf_config(file), dtype=torch.float32)


def read_by_transformers(file: GgufFile) -> dict[str, torch.Tensor]:
    model = hf.AutoModelForCausalLM.from_pretrained(
        file.path.parent,
        gguf_file=file.path.name,
        config=gguf_config(file),
        dtype=torch.float32,
        quantization_config=hf.GgufConfig(dequantize=True),
    )
    return model.state_dict()


def read_by_rows(file: GgufFile, rows: dict[str, StoredRows]) -> dict[str, torch.Tensor]:
    stored = {each.name: each for each in gguf.GGUFReader(file.path).tensors}
    read = {}
    for weight, row in rows.items():
        tensor = stored[row.tensor]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        read[weight] = values if row.order is None else values[row.order]
    return read


def write(path: Path, case: str, quantized: str | None) -> GgufFile:
    """The case's file, its tensors as llama.cpp's converter lays them out."""
    architecture, config, said = CASES[case]
    stock = make_stock(config)
    stock.config.max_position_embeddings = 128  # Bloom's has none
    tensors = {}
    for name, tensor in gguf_tensors(stock, architecture).items():
        stem = name.split(".")[-2]
        if architecture == "gpt2" and stem in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            tensors[name] = tensor.T if tensor.ndim > 1 else tensor
        if stem in ("ssm_conv1d", "conv"):
            tensors[name] = tensor[:, 0]
        if stem == "ffn_gate_inp_shexp":
            tensors[name] = tensor[0]
        if stem == "ssm_a":
            tensors["blk.0.ssm_a"] = -np.exp(tensor)
    for name, weight in stock.state_dict().items():
        parts = name.split(".")
        if "word_embeddings_layernorm" in name:
            tensors[f"token_embd_norm.{parts[-1]}"] = weight.numpy()
        if name.startswith("transformer.h.") and parts[3] == "post_attention_layernorm":
            tensors[f"blk.{parts[2]}.ffn_norm.{parts[-1]}"] = weight.numpy()
        if parts[-1] in ("dt_bias", "e_score_correction_bias"):
            kind = "ssm_dt" if parts[-1] == "dt_bias" else "exp_probs_b"
            tensors[f"blk.{parts[2]}.{kind}.bias"] = weight.numpy()
    drop = ("None.weight", "None.bias", "blk.0.ssm_a.weight")
    drop += ("feed_forward_length",) if architecture == "bloom" else ()
    options = {"tensors": tensors, "drop": drop, "quantized": quantized, **said}
    return read_header(write_gguf(path / "model.gguf", stock, architecture, **options))


@pytest.mark.parametrize("quantized", ["BF16", "Q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_to_the_bit_what_transformers_reads(
    case: str, quantized: str, tmp_path: Path
) -> None:
    file = write(tmp_path, case, quantized)
    model, stock = meta_model(file), read_by_transformers(file)
    rows = stored_rows(file, model)
    others = dict(float_weights(file, model, [name for name in stock if name not in rows]))
    ours = read_by_rows(file, rows) | others
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert ours.keys() == stock.keys() - tied
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.view(torch.int32), stock[name].view(torch.int32)), name


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_one_tensor_is_no_rows(case: str, tmp_path: Path) -> None:
    file = write(tmp_path, case, "Q8_0")
    model = meta_model(file)
    rows = stored_rows(file, model)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    matrices = {name for name, weight in model.state_dict().items() if weight.ndim > 1} - tied
    assert plain(matrices - rows.keys()) == OTHERS.get(case, set())
    assert plain(name for name, row in rows.items() if row.order is not None) == PERMUTED.get(
        case, set()
    )


# Of square weights: what a reader may do to them, and the order of the rows that are left, if any.
DONE: dict[str, tuple[Any, list[int] | None]] = {
    "nothing": (lambda weights: weights, []),
    "the rows turned round": (lambda weights: weights[::-1].copy(), list(range(96))[::-1]),
    "the columns turned round": (lambda weights: weights[:, ::-1].copy(), None),
    "transposed": (lambda weights: weights.T, None),
    "scaled": (lambda weights: weights * 0.5, None),
    "negated": (lambda weights: -weights, None),
    "one added": (lambda weights: weights + 1, None),
    "absolute values": (np.abs, None),
    "rounded": (np.rint, None),
    "a row twice": (lambda weights: weights[[0, *range(95)]], None),
    "one value another": (lambda weights: weights + np.eye(96, dtype=np.float32)[5] * 1e-3, None),
    "another shape": (lambda weights: weights[None], None),
}


@pytest.mark.parametrize("done", DONE)
def test_what_a_reader_does_to_a_tensor_is_noticed(
    done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.hf.stock_names import TENSOR_PROCESSORS, TensorProcessor

    change, order = DONE[done]

    class Processor(TensorProcessor):
        def process(self, weights: Any, name: str, **options: Any) -> Any:
            changed = change(weights) if name.endswith("attn_output.weight") else weights
            return super().process(changed, name, **options)

    file = write(tmp_path, "qwen2", "Q8_0")
    monkeypatch.setitem(TENSOR_PROCESSORS, "qwen2", Processor)
    row = stored_rows(file, meta_model(file)).get("model.layers.1.self_attn.o_proj.weight")
    if order is None:
        assert row is None
    else:
        assert row is not None and row.tensor == "blk.1.attn_output.weight"
        assert (row.order is None) if not order else row.order.tolist() == order


def test_no_weights_are_read_for_rows(tmp_path: Path) -> None:
    file = write(tmp_path, "llama", "Q8_0")
    model = meta_model(file)
    file.path.unlink()
    assert len(stored_rows(file, model)) == 16


def test_a_weight_that_transformers_does_not_make_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.hf.stock_names import TENSOR_PROCESSORS, TensorProcessor

    class Processor(TensorProcessor):
        def process(self, weights: Any, name: str, **options: Any) -> Any:
            return super().process(weights, "elsewhere", **options)

    file = write(tmp_path, "qwen2", None)
    monkeypatch.setitem(TENSOR_PROCESSORS, "qwen2", Processor)
    with pytest.raises(LoadError, match=r"makes no model\.norm\.weight of output_norm\.weight; "):
        list(float_weights(file, meta_model(file), ["model.norm.weight"]))


def test_every_kind_of_block_has_the_values_that_transformers_gives_it() -> None:
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

    teach_q5()
    for number, (_, size) in GGML_BLOCK.items():
        kind = gguf.GGMLQuantizationType(number)
        rows = np.random.default_rng(1).integers(0, 256, (64, 8 * size), dtype=np.uint8)
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are infinite or NaN
            ours = gguf.dequantize(rows, kind)
            given = dequantize(torch.from_numpy(rows), number).reshape(ours.shape).numpy()
        same = (ours.view(np.int32) == given.view(np.int32)) | (np.isnan(ours) & np.isnan(given))
        assert same.all(), kind


@pytest.mark.sweep
def test_the_demo_models_weights_are_to_the_bit_what_transformers_reads() -> None:
    if not demo_model().endswith(".gguf"):
        pytest.skip("the demo model is not installed")
    file = read_header(Path(demo_model()))
    model, stock = meta_model(file), read_by_transformers(file)
    rows = stored_rows(file, model)
    assert len(rows) == 1 + 7 * 30
    assert sum(row.order is not None for row in rows.values()) == 2 * 30
    others = float_weights(file, model, [name for name in stock if name not in rows])
    ours = read_by_rows(file, rows) | dict(others)
    assert ours.keys() == stock.keys() - {"lm_head.weight"}
    assert all(torch.equal(weight, stock[name]) for name, weight in ours.items())


def plain(names: Any) -> set[str]:
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
