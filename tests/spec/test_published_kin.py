"""Published config.json files of the families beside Llama, and their caches computed by hand.

K and V of a token take layers x 2 x kv heads x head dim x 2 bytes in bfloat16.
"""

import pytest

from headwise.spec import ModelSpec

THREE_TO_ONE = ["sliding_attention"] * 3 + ["full_attention"]


def sizes(model_type, layers, hidden, heads, kv_heads, **others):
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


MINISTRAL_3_8B = {
    "model_type": "mistral3",
    "text_config": sizes("ministral3", 34, 4096, 32, 8, head_dim=128, sliding_window=None),
    "vision_config": {"model_type": "pixtral"},
}
MISTRAL_SMALL_31 = {
    "model_type": "mistral3",
    "text_config": sizes("mistral", 40, 5120, 32, 8, head_dim=128, sliding_window=None),
}
OLMO3_32B = sizes(
    "olmo3",
    *(64, 5120, 40, 8),
    max_position_embeddings=65536,
    sliding_window=4096,
    layer_types=THREE_TO_ONE * 16,
)
GRANITE_33_8B = sizes("granite", 40, 4096, 32, 8, attention_multiplier=0.0078125)
GRANITE_4_H_SMALL = sizes(
    "granitemoehybrid",
    *(40, 4096, 32, 8),
    attention_multiplier=0.0078125,
    max_position_embeddings=131072,
    layer_types=(["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    mamba_d_conv=4,
    mamba_d_head=64,
    mamba_d_state=128,
    mamba_expand=2,
    mamba_n_groups=1,
    mamba_n_heads=128,
)
COMMAND_R = sizes("cohere", 40, 8192, 64, 64, use_qk_norm=False)
COMMAND_R_PLUS = sizes("cohere", 64, 12288, 96, 8, use_qk_norm=True)
COMMAND_R7B = sizes("cohere2", 32, 4096, 32, 8, sliding_window=4096, sliding_window_pattern=4)
EXAONE_4_32B = sizes(
    "exaone4",
    *(64, 5120, 40, 8),
    head_dim=128,
    sliding_window=4096,
    sliding_window_pattern="LLLG",
    layer_types=THREE_TO_ONE * 16,
)
GLM_45 = sizes("glm4_moe", 92, 5120, 96, 8, head_dim=128, use_qk_norm=True)
GLM_4_32B = sizes("glm4", 61, 6144, 48, 2, head_dim=128)
OPT_13B = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
}
GPT_NEOX_20B = {"model_type": "gpt_neox", "rotary_pct": 0.25}
MPT_7B = {
    "model_type": "mpt",
    "attn_config": {"alibi": True, "attn_type": "multihead_attention", "softmax_scale": None},
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
}


@pytest.mark.parametrize(
    ("config", "layer", "bytes_per_token"),
    [
        (MINISTRAL_3_8B, "GQA 32/8 heads, D 128", 34 * 4096),
        (MISTRAL_SMALL_31, "GQA 32/8 heads, D 128", 40 * 4096),
        (sizes("smollm3", 36, 2048, 16, 4), "GQA 16/4 heads, D 128", 36 * 2048),
        (sizes("olmo", 32, 4096, 32, 32), "MHA 32 heads, D 128", 32 * 16384),
        (sizes("olmo2", 64, 5120, 40, 8), "GQA 40/8 heads, D 128, qk-norm", 64 * 4096),
        (sizes("olmoe", 16, 2048, 16, 16), "MHA 16 heads, D 128, qk-norm", 16 * 8192),
        (OLMO3_32B, "GQA 40/8 heads, D 128, window 4096, qk-norm", 64 * 4096),
        (GRANITE_33_8B, "GQA 32/8 heads, D 128", 40 * 4096),
        (COMMAND_R, "MHA 64 heads, D 128", 40 * 32768),
        (COMMAND_R_PLUS, "GQA 96/8 heads, D 128, qk-norm", 64 * 4096),
        (COMMAND_R7B, "GQA 32/8 heads, D 128, window 4096", 32 * 4096),
        (EXAONE_4_32B, "GQA 40/8 heads, D 128, window 4096, qk-norm", 64 * 4096),
        (GLM_4_32B, "GQA 48/2 heads, D 128", 61 * 1024),
        (GLM_45, "GQA 96/8 heads, D 128, qk-norm", 92 * 4096),
        (
            sizes("hunyuan_v1_moe", 32, 4096, 32, 8, head_dim=128),
            "GQA 32/8 heads, D 128, qk-norm",
            32 * 4096,
        ),
        (sizes("ernie4_5_moe", 28, 2560, 20, 4), "GQA 20/4 heads, D 128", 28 * 2048),
        (sizes("seed_oss", 64, 5120, 80, 8, head_dim=128), "GQA 80/8 heads, D 128", 64 * 4096),
        (sizes("apertus", 80, 8192, 64, 8), "GQA 64/8 heads, D 128, qk-norm", 80 * 4096),
        (sizes("arcee", 36, 2560, 20, 4), "GQA 20/4 heads, D 128", 36 * 2048),
        (
            sizes("starcoder2", 40, 6144, 48, 4, sliding_window=4096),
            "GQA 48/4 heads, D 128, window 4096",
            40 * 2048,
        ),
        (GPT_NEOX_20B, "MHA 64 heads, D 96", 44 * 2 * 6144 * 2),
        # The 800 KB of PagedAttention's paper (https://arxiv.org/abs/2309.06180, section 3).
        (OPT_13B, "MHA 40 heads, D 128", 800 * 1024),
        (MPT_7B, "MHA 32 heads, D 128, ALiBi", 32 * 16384),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_token_costs_what_the_config_says(config, layer, bytes_per_token):
    spec = ModelSpec.from_config(config)
    assert str(spec.layers[0]) == layer
    assert spec.cache_bytes_per_token("bfloat16") == bytes_per_token
    assert spec.cache_bytes(1000, batch=3, dtype="bfloat16") == 3000 * bytes_per_token


@pytest.mark.parametrize("config", [OLMO3_32B, EXAONE_4_32B, COMMAND_R7B])
def test_windows_bound_three_of_four_layers(config):
    spec = ModelSpec.from_config(config)
    assert [layer.attention.window for layer in spec.layers[:4]] == [4096, 4096, 4096, None]
    quarter = len(spec.layers) // 4
    # 1024 elements of K and as many of V
    expected = quarter * 4096 * 65536 + 3 * quarter * 4096 * 4095
    assert spec.cache_bytes(65536) == expected


def test_granite_4_caches_keys_in_four_layers_and_states_in_the_others():
    spec = ModelSpec.from_config(GRANITE_4_H_SMALL)
    assert [layer.index for layer in spec.layers if layer.attention] == [5, 15, 25, 35]
    # 4 inputs of 8192 channels and of B and C, and a float32 matrix of 64 x 128 for each head
    state = (8192 + 2 * 128) * 4 * 2 + 128 * 64 * 128 * 4
    assert spec.cache_bytes(10_000) == 4 * 4096 * 10_000 + 36 * state
    assert spec.layers[5].attention.scale == 1 / 128
    # per element of a matrix and token: decay, update and product with C
    assert spec.layers[0].flops(3, 10_000) == 3 * 128 * 64 * 128 * 5
    assert str(spec.layers[0]) == "state-space duality 128/1 heads, state 128 x 64"


def test_limits_are_those_of_the_configs():
    assert ModelSpec.from_config(OPT_13B).max_context == 2048
    assert ModelSpec.from_config(MPT_7B).max_context == 2048
    assert ModelSpec.from_config(MINISTRAL_3_8B).max_context == 262144
