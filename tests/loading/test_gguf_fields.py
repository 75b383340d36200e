"""What a GGUF file says is what the model made of it computes, or the file is refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from headwise.errors import LoadError
from headwise.loading.gguf.conversion import read_config
from headwise.loading.gguf.store import converted
from headwise.loading.load import load
from loading.gguf_files import SIZES, make_stock, write_gguf

TOKENS = torch.arange(3, 60)[None]  # longer than the windows and original contexts below


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_stock(hf.LlamaConfig(**SIZES))


def scaled(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **options}


def llama3_divisors(dims: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """As llama.cpp's converter writes `rope_freqs`."""
    divisors = []
    for pair in range(0, dims, 2):
        wave = 2 * math.pi * 10_000.0 ** (pair / dims)
        if wave < context / high:
            divisors.append(1.0)
        elif wave > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def llama3(low: float, high: float, context: int) -> tuple[Any, dict[str, Any]]:
    options = {"factor": 8.0, "low_freq_factor": low, "high_freq_factor": high}
    rope = scaled("llama3", **options, original_max_position_embeddings=context)
    divisors = llama3_divisors(16, 8.0, low, high, context)
    config = hf.LlamaConfig(**SIZES, head_dim=16, rope_parameters=rope)
    return config, {"tensors": {"rope_freqs.weight": divisors}}


SHORT, LONG = [1 + pair / 10 for pair in range(8)], [2 + pair / 2 for pair in range(8)]
THREE = SIZES | {"num_attention_heads": 3, "num_key_value_heads": 3}  # D is 16
TIED = SIZES | {"tie_word_embeddings": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
YARN_FIELDS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
GEMMA_FIELDS = {
    "attention.sliding_window": 17,
    "attn_logit_softcapping": 19.0,
    "final_logit_softcapping": 7.0,
}
GEMMA3_ROPE = {
    "sliding_attention": scaled("default"),
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}

# What each says besides weights and sizes: the config of the stock model, and how the file says it.
HONOURED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama, heads that are not E/H, biases": (
        "llama",
        hf.LlamaConfig(**SIZES, head_dim=10, attention_bias=True, mlp_bias=True),
        {},
    ),
    "llama without key_length, called mistral": (
        "llama",
        hf.LlamaConfig(**SIZES),
        {"name": "mistral", "drop": ("attention.key_length", "attention.value_length")},
    ),
    "llama, linear": (
        "llama",
        hf.LlamaConfig(**SIZES, rope_parameters=scaled("linear", factor=4.0)),
        {"fields": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    ),
    "llama, a factor without a type": (
        "llama",
        hf.LlamaConfig(**SIZES, rope_parameters=scaled("linear", factor=4.0)),
        {"fields": {"rope.scale_linear": 4.0}},
    ),
    "llama, yarn": (
        "llama",
        hf.LlamaConfig(**TIED, rope_parameters=scaled("yarn", **YARN)),
        {"fields": YARN_FIELDS},
    ),
    "llama 3.1": ("llama", *llama3(1.0, 4.0, 8192)),
    "llama 3.1's scaling of another context": ("llama", *llama3(1.0, 4.0, 32)),
    "llama 3.1's scaling with other constants": ("llama", *llama3(2.0, 5.0, 64)),
    "qwen2, heads that are not E/H, yarn": (
        "qwen2",
        hf.Qwen2Config(**SIZES, head_dim=10, rope_parameters=scaled("yarn", **YARN)),
        {"fields": YARN_FIELDS},
    ),
    "qwen3 without key_length": (
        "qwen3",
        hf.Qwen3Config(**SIZES, head_dim=8),
        {"drop": ("attention.key_length", "attention.value_length")},
    ),
    "qwen3moe": (
        "qwen3moe",
        hf.Qwen3MoeConfig(
            **SIZES,
            head_dim=10,
            moe_intermediate_size=28,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        {
            "fields": {
                "expert_count": 5,
                "expert_used_count": 2,
                "expert_feed_forward_length": 28,
            }
        },
    ),
    "phi3, part of a head, a window": (
        "phi3",
        hf.Phi3Config(
            **THREE,
            sliding_window=17,
            rope_parameters=scaled("default", partial_rotary_factor=0.75),
        ),
        {"fields": {"attention.sliding_window": 17}},
    ),
    "phi3, LongRoPE": (
        "phi3",
        hf.Phi3Config(
            **THREE,
            original_max_position_embeddings=32,
            rope_parameters=scaled(
                "longrope",
                short_factor=SHORT,
                long_factor=LONG,
                original_max_position_embeddings=32,
            ),
        ),
        {
            "fields": {
                "rope.scaling.original_context_length": 32,
                "rope.scaling.attn_factor": math.sqrt(1 + math.log(128 / 32) / math.log(32)),
            },
            "tensors": {
                "rope_factors_short.weight": np.array(SHORT, np.float32),
                "rope_factors_long.weight": np.array(LONG, np.float32),
            },
        },
    ),
    "gemma2": (
        "gemma2",
        hf.Gemma2Config(
            **TIED,
            head_dim=10,
            sliding_window=17,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=19.0,
            final_logit_softcapping=7.0,
        ),
        {"fields": GEMMA_FIELDS},
    ),
    "gemma3, linear in its full layers": (
        "gemma3",
        hf.Gemma3TextConfig(
            **TIED | {"num_hidden_layers": 6},
            head_dim=10,
            query_pre_attn_scalar=10,
            sliding_window=17,
            rope_parameters=GEMMA3_ROPE,
        ),
        {
            "fields": {
                "attention.sliding_window": 17,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            }
        },
    ),
    "stablelm, half of a head": (
        "stablelm",
        hf.StableLmConfig(**THREE, rope_parameters=scaled("default", partial_rotary_factor=0.5)),
        {"fields": {"use_parallel_residual": False}},
    ),
    "starcoder2, another base": (
        "starcoder2",
        hf.Starcoder2Config(
            **SIZES,
            sliding_window=None,
            rope_parameters=scaled("default") | {"rope_theta": 99_991.0},
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", HONOURED)
def test_logits_are_those_of_the_model_whose_weights_were_written(
    case: str, tmp_path: Path
) -> None:
    architecture, config, said = HONOURED[case]
    stock = make_stock(config)
    file = write_gguf(tmp_path / "model.gguf", stock, architecture, **said)
    model, _ = load(file, attention="eager")
    with torch.no_grad():
        got, right = model(TOKENS).logits, stock(TOKENS).logits
    # The same sums of the same numbers, but for divisors and eps that went through float32.
    assert (got - right).abs().max() < 1e-4 * right.abs().max()


def test_llama_31_keeps_its_own_name_for_its_scaling(tmp_path: Path) -> None:
    config, said = llama3(1.0, 4.0, 32)
    file = write_gguf(tmp_path / "model.gguf", make_stock(config), "llama", **said)
    assert read_config(file)["rope_parameters"] == config.rope_parameters


WRONG_FIELDS: dict[str, Any] = {
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.5,
    "attention.sliding_window": 17,
    "attention.value_length": 10,
    "attn_logit_softcapping": 50.0,
    "expert_count": 4,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.25,
    "residual_scale": 0.22,
    "rope.dimension_count": 6,
    "rope.dimension_sections": [2, 2, 0, 0],
    "something.new": 3,
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_a_field_that_would_be_ignored_is_refused_by_name(
    llama: Any, tmp_path: Path, field: str, cache: Path
) -> None:
    value = WRONG_FIELDS[field]
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", fields={field: value})
    with pytest.raises(LoadError) as caught:
        converted(file)
    # a rotation of part of a head makes heads of that size in Llama, and no tensor fits them
    said = r"rotation" if field == "rope.dimension_count" else f"llama.{field}"
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in cache.glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.type": "longrope"},
        {"rope.scaling.type": "twisted", "rope.scaling.factor": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.7},
    ],
)
def test_a_scaling_that_cannot_be_handed_on_is_refused(
    llama: Any, tmp_path: Path, fields: dict[str, Any]
) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", fields=fields)
    with pytest.raises(LoadError, match=r"asks for .*(yarn|longrope|twisted)"):
        converted(file)


def test_fields_that_change_no_number_pass(llama: Any, tmp_path: Path) -> None:
    fields = {
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.scale": 8**-0.5,
        "attention.sliding_window": 128,  # the whole context
        "expert_count": 0,
        "final_logit_softcapping": 0.0,
        "logit_scale": 1.0,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 4.0,
        "rope.scaling.finetuned": False,
        "tensor_data_layout": "Meta AI original pth",
    }
    keys = {
        "general.file_type": 0,
        "general.quantization_version": 2,
        "general.tags": ["a", "b"],
        "quantize.imatrix.file": "x.dat",
        "split.count": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    file = write_gguf(tmp_path / "model.gguf", llama, "llama", fields=fields, keys=keys)
    model, _ = load(file, attention="eager")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, llama(TOKENS).logits)


def test_llamas_file_that_does_not_count_its_kv_heads_is_refused(tmp_path: Path) -> None:
    # Transformers' reader would leave queries and keys in the order of another rotation
    file = tmp_path / "m.gguf"
    stock = make_stock(
        hf.LlamaConfig(**SIZES | {"num_key_value_heads": SIZES["num_attention_heads"]})
    )
    write_gguf(file, stock, "llama", drop=("attention.head_count_kv",))
    with pytest.raises(LoadError, match=r"does not say llama\.attention\.head_count_kv"):
        load(file)


@pytest.mark.parametrize("name", ["attn_factor", "yarn_attn_factor"])
@pytest.mark.parametrize("scaling", [{}, {"type": "linear", "factor": 2.0}])
def test_a_factor_for_attention_beside_a_plain_rotation_is_refused(
    name: str, scaling: dict[str, Any], llama: Any, tmp_path: Path
) -> None:
    fields = {f"rope.scaling.{key}": value for key, value in (scaling | {name: 2.0}).items()}
    write_gguf(tmp_path / "m.gguf", llama, "llama", fields=fields)
    with pytest.raises(LoadError, match=rf"rope\.scaling\.{name} 2\.0"):
        load(tmp_path / "m.gguf")
