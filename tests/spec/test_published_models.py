"""Published config.json files, as they are, give the published numbers."""

import pytest

from headwise.spec import ModelSpec

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
GEMMA2_9B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "head_dim": 256,
    "hidden_size": 3584,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
FALCON_7B = {
    "model_type": "falcon",
    "alibi": False,
    "hidden_size": 4544,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "parallel_attn": True,
}
FALCON_40B = {
    "model_type": "falcon",
    "alibi": False,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "parallel_attn": True,
}
FALCON_RW_1B = {
    "model_type": "falcon",
    "alibi": True,
    "hidden_size": 2048,
    "multi_query": False,
    "new_decoder_architecture": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "type": "yarn"},
    "v_head_dim": 128,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
    "v_head_dim": 128,
}
# Of LongCat-Flash-Chat, Youtu-LLM-2B and Kimi-Linear-48B-A3B: what a config.json says.
LONGCAT_FLASH = {
    "model_type": "longcat_flash",
    "hidden_size": 6144,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_layers": 28,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
YOUTU_2B = {
    "model_type": "youtu",
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "num_key_value_heads": 16,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
KIMI_LINEAR_48B = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [
            *(1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26),
        ],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "model_max_length": 1048576,
    "num_attention_heads": 32,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": None,
    "v_head_dim": 128,
}
STARCODER = {
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_layer": 40,
    "n_positions": 8192,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "sliding_window": 128,
}

LLAMA4_SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "use_qk_norm": True,
    },
    "vision_config": {"model_type": "llama4_vision_model"},
}
GEMMA4_26B = {
    "model_type": "gemma4",
    "text_config": {
        "attention_k_eq_v": True,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 2816,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "max_position_embeddings": 262144,
        "model_type": "gemma4_text",
        "num_attention_heads": 16,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    },
}
GEMMA4_E2B = {
    "model_type": "gemma4",
    "text_config": {
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 1536,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "model_type": "gemma4_text",
        "num_attention_heads": 8,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "sliding_window": 512,
    },
}
NEMOTRON_NANO_9B_V2 = {
    "model_type": "nemotron_h",
    "conv_kernel": 4,
    "head_dim": 128,
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "mamba_head_dim": 80,
    "mamba_num_heads": 128,
    "max_position_embeddings": 131072,
    "n_groups": 8,
    "num_attention_heads": 40,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
    "ssm_state_size": 128,
}
MINITRON_4B = {
    "model_type": "nemotron",
    "head_dim": 128,
    "hidden_size": 3072,
    "max_position_embeddings": 4096,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
LFM2_1_2B = {
    "model_type": "lfm2",
    "conv_L_cache": 3,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
}
QWEN1_5_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
MINIMAX_M2 = {
    "model_type": "minimax_m2",
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 48,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "rotary_dim": 64,
}
KIMI_K2_5 = {
    "model_type": "kimi_k25",
    "text_config": {
        "hidden_size": 7168,
        "kv_lora_rank": 512,
        "max_position_embeddings": 262144,
        "model_type": "kimi_k2",
        "num_attention_heads": 64,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": {"factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
        "v_head_dim": 128,
    },
}
PHI3_MINI_128K = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144,
}
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "hidden_size": 1280},
}
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 4096,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
}
GLM_4_5V = {
    "model_type": "glm4v_moe",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 4096,
        "max_position_embeddings": 65536,
        "model_type": "glm4v_moe_text",
        "num_attention_heads": 96,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
    },
}
WHISPER_LARGE_V3 = {
    "model_type": "whisper",
    "d_model": 1280,
    "decoder_attention_heads": 20,
    "decoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_layers": 32,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "num_hidden_layers": 32,
}


@pytest.mark.parametrize(
    ("config", "mechanism", "bytes_per_token"),
    [
        (SMOLLM2_135M, "GQA", 23_040),
        (LLAMA2_7B, "MHA", 524_288),
        (LLAMA3_8B, "GQA", 131_072),
        (QWEN2_7B, "GQA", 57_344),
        (FALCON_7B, "MQA", 8_192),
        (FALCON_40B, "GQA", 122_880),
        (FALCON_RW_1B, "MHA", 196_608),
        (STARCODER, "MQA", 20_480),
        # DeepSeek-V3 report: 61 layers x (512 + 64) elements.
        (DEEPSEEK_V3, "MLA", 70_272),
        (KIMI_K2_5, "MLA", 70_272),
        # 2 rows x kv heads x D x 2 bytes, in each layer
        (MINITRON_4B, "GQA", 32 * 2 * 8 * 128 * 2),
        (QWEN1_5_MOE, "MHA", 24 * 2 * 16 * 128 * 2),
        (MINIMAX_M2, "GQA", 62 * 2 * 8 * 128 * 2),
        # LongRoPE changes angles, not sizes
        (PHI3_MINI_128K, "MHA", 32 * 2 * 32 * 96 * 2),
        (QWEN2_5_VL_7B, "GQA", 57_344),
        (QWEN3_VL_8B, "GQA", 36 * 2 * 8 * 128 * 2),
        (GLM_4_5V, "GQA", 46 * 2 * 8 * 128 * 2),
        # 32 layers x 576 elements; LongCat-Flash has 28 layers that attend twice.
        (YOUTU_2B, "MLA", 36_864),
        (LONGCAT_FLASH, "MLA", 64_512),
        # 61 layers x 576; Mistral Small 4 has 36 layers of 256 + 64.
        ({"model_type": "axk1"}, "MLA", 70_272),
        ({"model_type": "mistral4"}, "MLA", 23_040),
    ],
)
def test_cache_cost_of_a_token_is_the_published_one(config, mechanism, bytes_per_token):
    spec = ModelSpec.from_config(config)
    assert {layer.attention.mechanism for layer in spec.layers} == {mechanism}
    assert spec.cache_bytes_per_token("bfloat16") == bytes_per_token
    assert spec.cache_bytes(1000, batch=3, dtype="bfloat16") == 3000 * bytes_per_token


def test_deepseek_v3_caches_576_elements_in_each_of_61_layers():
    spec = ModelSpec.from_config(DEEPSEEK_V3)
    assert [layer.attention.cache_elements_per_token for layer in spec.layers] == [576] * 61
    # The softmax scale that serving engines hard-code for this model.
    assert spec.layers[0].attention.scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert spec.layers[0].attention.query_rank == 1536


def test_deepseek_v2_lite_projects_its_queries_directly():
    attention = ModelSpec.from_config(DEEPSEEK_V2_LITE).layers[0].attention
    assert (attention.query_rank, attention.nope_dim, attention.rope_dim) == (None, 128, 64)
    assert str(attention) == "MLA 16 heads, R 512 + P 64"


def test_longcat_flash_attends_twice_in_each_of_28_layers():
    spec = ModelSpec.from_config(LONGCAT_FLASH)
    assert len(spec.layers) == 56
    assert spec.layers[0].attention.scale == 192**-0.5


def test_mistral_small_4_has_yarn_in_its_scale_by_default():
    attention = ModelSpec.from_config({"model_type": "mistral4"}).layers[0].attention
    # a factor of 128: (0.1 ln 128 + 1)^2 / sqrt(128)
    assert attention.scale == pytest.approx(0.19495, rel=1e-4)


def test_kimi_linear_keeps_three_states_for_each_latent_cache():
    spec = ModelSpec.from_config(KIMI_LINEAR_48B)
    latent = [layer.index for layer in spec.layers if layer.attention is not None]
    assert latent == [3, 7, 11, 15, 19, 23, 26]
    # the paper's ratio of 3 to 1: 7 of 27 layers cache, here 576 elements a token
    assert spec.cache_bytes_per_token("bfloat16") == 7 * 576 * 2
    # per layer 32 matrices of 128 x 128 in float32, and 4 inputs of 3 x 4096 channels
    state = 32 * 128 * 128 * 4 + 4 * 3 * 4096 * 2
    assert spec.cache_bytes(1000) == 7 * 576 * 2 * 1000 + 20 * state
    assert spec.max_context == 1048576


def test_ling_3_attends_in_every_sixth_layer():
    spec = ModelSpec.from_config({"model_type": "bailing_hybrid"})
    latent = [layer.index for layer in spec.layers if layer.attention is not None]
    assert latent == [5, 11, 17, 23, 29, 35, 41]
    state = 32 * 128 * 128 * 4 + 4 * 3 * 4096 * 2
    assert spec.cache_bytes(1) == 7 * 576 * 2 + 35 * state


def test_gemma3_has_five_local_layers_for_each_global_one():
    spec = ModelSpec.from_config(GEMMA3_4B)
    windows = [layer.attention.window for layer in spec.layers]
    assert windows == ([1024] * 5 + [None]) * 5 + [1024] * 4
    assert str(spec.layers[5]) == "GQA 8/4 heads, D 256, qk-norm"
    assert spec.max_context == 131072


def test_gemma2_alternates_and_starts_local():
    spec = ModelSpec.from_config(GEMMA2_9B)
    assert [layer.attention.window for layer in spec.layers] == [4096, None] * 21
    assert {layer.attention.softcap for layer in spec.layers} == {50.0}


def test_falcon_layouts_have_their_published_kv_heads():
    heads = [
        ModelSpec.from_config(config).layers[0].attention
        for config in (FALCON_7B, FALCON_40B, FALCON_RW_1B)
    ]
    assert [(spec.heads, spec.kv_heads, spec.head_dim) for spec in heads] == [
        (71, 1, 64), (128, 8, 64), (32, 32, 64)
    ]  # fmt: skip
    assert [spec.alibi for spec in heads] == [False, False, True]


def test_mistral_holds_one_token_less_than_its_window_between_calls():
    spec = ModelSpec.from_config(MISTRAL_7B)
    assert spec.cache_bytes(4095) == spec.cache_bytes(32768) == 4095 * 131_072
    assert spec.cache_bytes(4094) == 4094 * 131_072


def test_gpt_oss_windows_bound_half_of_the_layers():
    spec = ModelSpec.from_config(GPT_OSS_20B)
    per_layer = 2 * 8 * 64 * 2
    assert spec.cache_bytes(10_000) == 12 * per_layer * 10_000 + 12 * per_layer * 127
    assert all(layer.attention.sinks for layer in spec.layers)


def test_llama4_scout_holds_a_chunk_in_three_layers_of_four():
    spec = ModelSpec.from_config(LLAMA4_SCOUT)
    row = 2 * 8 * 128 * 2
    assert spec.cache_bytes(1_000_000) == 12 * row * 1_000_000 + 36 * row * 8191
    assert str(spec.layers[0]) == "GQA 40/8 heads, D 128, chunks of 8192, qk-norm"
    assert str(spec.layers[3]) == "GQA 40/8 heads, D 128"
    assert spec.max_context == 10_485_760


def test_gemma4_has_heads_of_512_in_global_layers():
    spec = ModelSpec.from_config(GEMMA4_26B)
    local, whole = 2 * 8 * 256 * 2, 2 * 2 * 512 * 2
    assert spec.cache_bytes(100_000) == 25 * local * 1023 + 5 * whole * 100_000
    assert {layer.attention.scale for layer in spec.layers} == {1.0}


def test_gemma4_e2b_caches_15_of_its_35_layers():
    spec = ModelSpec.from_config(GEMMA4_E2B)
    assert [layer.index for layer in spec.layers if layer.cached] == list(range(15))
    assert {layer.shares for layer in spec.layers[15:]} == {13, 14}
    assert spec.cache_bytes(100_000) == 12 * 2 * 256 * 2 * 511 + 3 * 2 * 512 * 2 * 100_000


def test_nemotron_nano_attends_in_4_of_56_layers():
    spec = ModelSpec.from_config(NEMOTRON_NANO_9B_V2)
    kinds = [str(layer) for layer in spec.layers]
    assert kinds.count("GQA 40/8 heads, D 128") == 4
    assert kinds.count("state-space duality 128/8 heads, state 128 x 80") == 27
    # x, B and C of 8 groups, four of each in bfloat16; and a state in float32
    state = (128 * 80 + 2 * 8 * 128) * 4 * 2 + 128 * 80 * 128 * 4
    assert spec.cache_bytes(5000) == 27 * state + 4 * 2 * 8 * 128 * 2 * 5000


def test_lfm2_keeps_three_inputs_of_each_convolution():
    spec = ModelSpec.from_config(LFM2_1_2B)
    assert [layer.index for layer in spec.layers if layer.cached] == [2, 5, 8, 10, 12, 14]
    assert spec.cache_bytes(4000) == 10 * 2048 * 3 * 2 + 6 * 2 * 8 * 64 * 2 * 4000


def test_whisper_caches_the_audio_once_and_the_text_as_it_grows():
    spec = ModelSpec.from_config(WHISPER_LARGE_V3)
    row = 2 * 20 * 64 * 2
    assert spec.cache_bytes(100, encoder_context=1500) == 32 * row * (100 + 1500)
    assert (len(spec.encoder_layers), spec.max_context) == (32, 448)


def test_phi3_with_longrope_takes_the_long_context():
    assert ModelSpec.from_config(PHI3_MINI_128K).max_context == 131_072
