"""A config that cannot be read or contradicts itself: a one-line error names the field."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import SpecError
from headwise.spec import ModelSpec
from headwise.spec.families import FAMILIES

SLIDING = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "model_type=None"),
        ({"model_type": 7}, "model_type=7"),
        ({"model_type": "mamba"}, "expected one of [0-9]+, as "),
        ({"model_type": "gemma3_txt"}, "expected one of [0-9]+, as gemma3_text, gemma"),
        ({"model_type": "llava"}, "model_type='llava'"),
        ({"model_type": "llava", "text_config": {}}, "model_type=None"),
        ({"model_type": "llava", "text_config": {"model_type": "mamba"}}, "model_type='mamba'"),
        ({"model_type": "gemma3", "text_config": 7}, "config is int 7"),
        (None, "config is NoneType"),
        ("config.json", "config is str 'config.json'"),
        (torch.nn.Linear(2, 3), "model.config"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}, "hidden_size=100"),
        ({"model_type": "bert", "hidden_size": 100, "num_attention_heads": 7}, "hidden_size=100"),
        ({"model_type": "gpt2", "n_embd": 100, "n_head": 7}, "n_embd=100"),
        ({"model_type": "falcon", "hidden_size": 100}, "hidden_size=100"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"model_type": "gemma2", "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"model_type": "gpt_oss", "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 1}, "num_key_value_heads=1"),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8},
            "num_kv_heads=8",
        ),
        ({"model_type": "falcon", "multi_query": False, "num_kv_heads": 1}, "num_kv_heads=1"),
        ({"model_type": "qwen2", "layer_types": SLIDING}, "layer_types has 2 entries"),
        ({"model_type": "qwen2", "layer_types": "full"}, "layer_types has 'full'"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": SLIDING},
            "sliding_window is not set",
        ),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is not set"),
        ({"model_type": "gpt_oss", "sliding_window": None}, "sliding_window is not set"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window is not set"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            "layer_types contains 'linear_attention'",
        ),
        (
            {"model_type": "llama", "num_hidden_layers": 10**9},
            "num_hidden_layers=1000000000: expected at most 10,000",
        ),
        ({"model_type": "t5", "num_decoder_layers": 10**9}, "num_decoder_layers=1000000000"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers=-1"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -5.0}, "attn_logit_softcapping=-5.0"),
        ({"model_type": "bert", "add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "gpt_bigcode", "add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "bert", "is_decoder": "no"}, "is_decoder='no'"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id=None"),
        ({"model_type": "roberta", "pad_token_id": 511}, "pad_token_id=511"),
        (
            {"model_type": "gpt2", "n_embd": 768, "hidden_size": 512},
            "hidden_size=512 contradicts n_embd=768",
        ),
        ({"model_type": "deepseek_v3", "rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        (
            {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}},
            "rope_scaling.factor=None",
        ),
        (
            {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
            "use_bidirectional_attention='all'",
        ),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 26}, r"layer 5 \(window None\)"),
        ({"model_type": "gemma4_text", "per_layer_config": [1]}, r"per_layer_config=\[1\]"),
        ({"model_type": "gemma4_text", "per_layer_config": {"30": {}}}, "has '30': {}"),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"3": {"sliding_window": 8}}},
            "'sliding_window': 8}: expected",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"03": {"head_dim": 0}}},
            "head_dim=0",
        ),
        (
            {
                "model_type": "gemma4_text",
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 3,
            },
            "kv_heads=3 does not divide heads=8",
        ),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]"),
        (
            {
                "model_type": "llama4_text",
                "num_hidden_layers": 1,
                "attention_chunk_size": None,
                "layer_types": ["chunked_attention"],
            },
            "attention_chunk_size is not set while 1 of 1",
        ),
        ({"model_type": "mamba2", "num_heads": 3}, "num_heads=3 with head_dim=64: expected heads"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "contains 'X'"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": ""}, "hybrid_override_pattern=''"),
        ({"model_type": "nemotron_h", "layers_block_type": "M*"}, "layers_block_type='M\\*'"),
        ({"model_type": "nemotron_h", "layer_types": ["conv"]}, "contains 'conv'"),
        ({"model_type": "lfm2", "full_attn_idxs": 3}, "layers that attend are 3"),
        ({"model_type": "lfm2_moe"}, "layer_types=None"),
        ({"model_type": "whisper", "decoder_attention_heads": 7}, "decoder_attention_heads=7"),
        ({"model_type": "llama", "is_causal": False}, "is_causal=False"),
        ({"model_type": "mpt", "attn_config": [1]}, r"attn_config=\[1\]"),
        (
            {"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}},
            "attn_config.attn_type='multiquery_attention'",
        ),
        (
            {"model_type": "mpt", "attn_config": {"softmax_scale": 0}},
            "attn_config.softmax_scale=0",
        ),
        (
            {"model_type": "granitemoehybrid", "mamba_d_head": 63},
            "mamba_n_heads=128 with mamba_d_head=63: .* = 8192",
        ),
        ({"model_type": "granitemoehybrid", "mamba_d_head": None}, "mamba_d_head=None"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, "sliding_window_pattern="),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 9}
            | {"no_rope_layers": [1]},
            r"no_rope_layers=\[1\]: expected a list",
        ),
        ({"model_type": "paligemma"}, "text_config is missing: .* 'paligemma'"),
        ({"model_type": "mistral3", "text_config": {"model_type": "x"}}, "model_type='x'"),
        ({"model_type": "llama", "per_layer_config": {"3": {"head_dim": 8}}}, "per_layer_config"),
    ],
)  # fmt: skip
def test_error_names_the_field(config, named):
    with pytest.raises(SpecError, match=named) as caught:
        ModelSpec.from_config(config)
    assert "\n" not in str(caught.value)


def test_head_dim_frees_the_hidden_size_from_the_heads():
    config = {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7, "head_dim": 11}
    assert ModelSpec.from_config(config).layers[0].attention.head_dim == 11


def test_layers_cannot_share_what_no_earlier_layer_of_their_kind_has():
    config = {"model_type": "gemma3n_text", "num_hidden_layers": 5, "num_kv_shared_layers": 1}
    with pytest.raises(SpecError, match=r"layer 4 \(window None\) shares"):
        ModelSpec.from_config(config)
    with pytest.raises(SpecError, match=r"layer 0 \(window 512\) shares"):
        ModelSpec.from_config(config | {"num_kv_shared_layers": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 37}, r"kv_lora_rank=37: expected a list of 2 integers"),
        ({"kv_lora_rank": None}, r"kv_lora_rank=None: expected a list of 2 integers"),
        ({"kv_lora_rank": [37]}, r"kv_lora_rank=\[37\]: expected a list of 2 integers"),
        ({"kv_lora_rank": [37, 0]}, "kv_lora_rank=0: expected an integer of at least 1"),
        ({"qk_rope_head_dim": "68"}, "qk_rope_head_dim='68': expected a list"),
        ({"qk_rope_head_dim": [6, 7]}, "qk_rope_head_dim has 7: expected even"),
        ({"qk_rope_head_dim": [6, 0]}, "qk_rope_head_dim=0"),
        ({"qk_nope_head_dim": [6, 0]}, "qk_nope_head_dim has 6 with head_dim=14"),
        ({"head_dim": 12}, "qk_nope_head_dim has 14 with head_dim=12"),
        ({"v_head_dim": None}, "v_head_dim=None"),
        ({"attention_scale": None}, "attention_scale=None"),
        ({"attention_scale": float("nan")}, "attention_scale=nan"),
        ({"num_key_value_heads": 1}, "leave num_key_value_heads out"),
    ],
)
def test_sizes_of_latents_that_do_not_fit_the_layers_are_named(change, message):
    good = {
        "model_type": "headwise_mla",
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "head_dim": 14,
        "kv_lora_rank": [37, 29],
        "qk_rope_head_dim": [6, 22],
        "qk_nope_head_dim": [14, 0],
        "v_head_dim": 23,
        "attention_scale": 0.37,
    }
    assert ModelSpec.from_config(good).layers[1].attention.nope_dim == 0
    with pytest.raises(SpecError, match=message) as caught:
        ModelSpec.from_config(good | change)
    assert "\n" not in str(caught.value)


def test_kinds_of_layers_that_are_not_covered_are_named():
    config = {"model_type": "qwen3_next", "num_hidden_layers": 1, "layer_types": ["moe"]}
    with pytest.raises(SpecError, match="'moe'"):
        ModelSpec.from_config(config)
    with pytest.raises(SpecError, match="layer_types has 2 entries"):
        ModelSpec.from_config(config | {"layer_types": ["linear_attention"] * 2})


def test_layer_types_written_before_transformers_5_are_understood():
    config = {"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["attention"]}
    assert ModelSpec.from_config(config).layers[0].attention.window is None


class Asked(dict):
    """A config that keeps the names that a reader asks for."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def get(self, name: str, default: object = None) -> object:
        self.names.add(name)
        return super().get(name, default)


def asked(model_type: str) -> set[str]:
    """What a reader looks at by default: not a window that is off, nor any size that is given."""
    config = Asked({"model_type": model_type})
    with suppress(SpecError):  # of our own families, some sizes have no default
        ModelSpec.from_config(config)
    return config.names


INTEGER_FIELDS = sorted(
    (model_type, name)
    for model_type, family in FAMILIES.items()
    for name in family.defaults.keys() & asked(model_type)
    if type(family.defaults[name]) is int
)


@given(
    st.sampled_from(INTEGER_FIELDS),
    st.one_of(st.integers(max_value=-1), st.booleans(), st.text(max_size=3), st.just(float("nan"))),
)
def test_any_field_that_should_count_something_and_does_not_is_named(field, value):
    model_type, name = field
    with pytest.raises(SpecError, match=name):
        ModelSpec.from_config({"model_type": model_type, name: value})
