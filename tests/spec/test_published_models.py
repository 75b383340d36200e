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
