"""Small configs of every family, and the attention modules that Transformers builds from them.

The numbers are chosen so that no product of two of them equals another product.
"""

import functools
import warnings
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel

import headwise.hf  # noqa: F401  (makes headwise_mla known)

GROUPED = {
    "hidden_size": 60,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "num_hidden_layers": 7,
    "intermediate_size": 17,
    "vocab_size": 31,
    "pad_token_id": 0,
}
HEADS = {
    "hidden_size": 55,
    "num_attention_heads": 5,
    "num_hidden_layers": 3,
    "intermediate_size": 17,
    "vocab_size": 31,
}
GPT = {"n_embd": 55, "n_head": 5, "n_layer": 3, "n_positions": 43, "vocab_size": 31}
FALCON = {"hidden_size": 84, "num_attention_heads": 6, "num_hidden_layers": 3, "vocab_size": 31}
MIXED = ["full_attention", "sliding_attention"] * 3 + ["sliding_attention"]
MLA = {
    "hidden_size": 60,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "num_hidden_layers": 3,
    "intermediate_size": 17,
    "moe_intermediate_size": 11,
    "n_routed_experts": 8,
    "vocab_size": 31,
    "kv_lora_rank": 37,
    "q_lora_rank": 29,
    "qk_nope_head_dim": 13,
    "qk_rope_head_dim": 6,
    "v_head_dim": 23,
}
# of 8 experts in groups
CHOSEN = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
LONGCAT = {key: value for key, value in MLA.items() if key != "num_hidden_layers"} | {
    "num_layers": 2,
    "ffn_hidden_size": 17,
    "expert_ffn_hidden_size": 11,
    "moe_topk": 2,
    "head_dim": 6,
}
DELTA = MLA | {"num_hidden_layers": 7, "q_lora_rank": None, "num_experts": 8, "n_group": 2}
DELTA |= {"pad_token_id": 0}
OWN_MLA = {
    "hidden_size": 60,
    "num_attention_heads": 5,
    "head_dim": 14,
    "num_hidden_layers": 3,
    "intermediate_size": 17,
    "vocab_size": 31,
    "kv_lora_rank": [37, 29, 41],
    "qk_rope_head_dim": [6, 22, 10],
    "qk_nope_head_dim": [14, 0, 14],
    "v_head_dim": 23,
    "attention_scale": 0.37,
}
YARN = {
    "type": "yarn",
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

LINEAR = {
    "head_dim": 22,
    "mlp_only_layers": list(range(7)),
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 11,
    "linear_value_head_dim": 13,
    "linear_conv_kernel_dim": 5,
}
NEXT_TYPES = ["linear_attention", "full_attention", "full_attention"] + ["linear_attention"] * 4
MAMBA = {
    "hidden_size": 60,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 22,
    "intermediate_size": 17,
    "moe_intermediate_size": 11,
    "moe_shared_expert_intermediate_size": 13,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 31,
    "ssm_state_size": 6,
    "mamba_num_heads": 4,
    "mamba_head_dim": 9,
    "n_groups": 2,
    "conv_kernel": 3,
    "chunk_size": 8,
}
GEMMA4 = {
    "num_attention_heads": 20,
    "head_dim": 22,
    "global_head_dim": 26,
    "sliding_window": 19,
    "hidden_size_per_layer_input": 3,
    "vocab_size_per_layer_input": 31,
}
CHUNKED = {
    "head_dim": 22,
    "num_local_experts": 2,
    "intermediate_size_mlp": 19,
    "attention_chunk_size": 19,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 11}
GLM_EXPERTS = {"n_routed_experts": 8, "moe_intermediate_size": 11, "topk_group": 1, "n_group": 1}
GRANITE = {"attention_multiplier": 0.37, "shared_intermediate_size": 13, "num_local_experts": 2}
GRANITE_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 5,
    "mamba_chunk_size": 8,
    "layers_block_type": ["mamba", "attention", "mamba", "mamba", "attention", "mamba", "mamba"],
}

MPT = {"d_model": 55, "n_heads": 5, "n_layers": 3, "max_seq_len": 43, "vocab_size": 31}

# name -> (model_type, fields as a config.json gives them)
CONFIGS = {
    "bert": ("bert", HEADS),
    "bert decoder": ("bert", HEADS | {"is_decoder": True, "add_cross_attention": True}),
    "roberta": ("roberta", HEADS | {"max_position_embeddings": 514}),
    "roberta decoder": ("roberta", HEADS | {"is_decoder": True}),
    "t5": (
        "t5",
        {
            "d_model": 55,
            "d_kv": 7,
            "num_heads": 5,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "d_ff": 17,
            "vocab_size": 31,
        },
    ),
    "gpt2": ("gpt2", GPT),
    "gpt2 unscaled": ("gpt2", GPT | {"scale_attn_weights": False}),
    "gpt2 by depth": (
        "gpt2",
        GPT | {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
    ),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode heads": ("gpt_bigcode", GPT | {"multi_query": False, "scale_attn_weights": False}),
    "falcon shared": ("falcon", FALCON | {"num_kv_heads": 6}),
    "falcon grouped": ("falcon", FALCON | {"num_kv_heads": 3, "new_decoder_architecture": True}),
    "falcon alibi": ("falcon", FALCON | {"multi_query": False, "alibi": True}),
    "bloom": ("bloom", {"hidden_size": 55, "n_head": 5, "n_layer": 3, "vocab_size": 31}),
    "llama": ("llama", GROUPED),
    "llama head_dim": ("llama", GROUPED | {"head_dim": 22, "num_key_value_heads": None}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 19}),
    "mistral full": ("mistral", GROUPED | {"sliding_window": None, "head_dim": 22}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 windows": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 4},
    ),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 22}),
    "qwen3 layer types": (
        "qwen3",
        GROUPED | {"use_sliding_window": True, "sliding_window": 19, "layer_types": MIXED},
    ),
    "gemma2": (
        "gemma2",
        GROUPED | {"head_dim": 22, "query_pre_attn_scalar": 41, "sliding_window": 19},
    ),
    "gemma2 uncapped": ("gemma2", GROUPED | {"attn_logit_softcapping": None}),
    "gemma3_text": (
        "gemma3_text",
        GROUPED | {"head_dim": 22, "query_pre_attn_scalar": 41, "sliding_window": 19},
    ),
    "gemma3_text pattern": (
        "gemma3_text",
        GROUPED | {"sliding_window_pattern": 3, "attn_logit_softcapping": 53.0},
    ),
    "gemma3_text bidirectional": (
        "gemma3_text",
        GROUPED | {"use_bidirectional_attention": True, "sliding_window": 39},
    ),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "mixtral windows": ("mixtral", GROUPED | {"num_local_experts": 2, "sliding_window": 19}),
    "phi3": ("phi3", GROUPED | {"sliding_window": 19}),
    "phi3 full": ("phi3", GROUPED | {"num_key_value_heads": None, "head_dim": 22}),
    "glm": ("glm", GROUPED | {"head_dim": 22}),
    "gemma": ("gemma", GROUPED | {"head_dim": 22}),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 22}),
    "qwen3_moe windows": (
        "qwen3_moe",
        GROUPED | EXPERTS | {"use_sliding_window": True, "sliding_window": 19},
    ),
    "qwen3_next": ("qwen3_next", GROUPED | EXPERTS | LINEAR),
    "qwen3_next layer types": (
        "qwen3_next",
        GROUPED | EXPERTS | LINEAR | {"layer_types": NEXT_TYPES},
    ),
    "qwen3_5": ("qwen3_5_text", GROUPED | LINEAR),
    "gemma3n": (
        "gemma3n_text",
        GROUPED
        | {
            "head_dim": 22,
            "sliding_window": 19,
            "num_kv_shared_layers": 2,
            "num_attention_heads": 10,
            "layer_types": MIXED,
            "vocab_size_per_layer_input": 31,
        },
    ),
    "gemma4": (
        "gemma4_text",
        GROUPED
        | GEMMA4
        | {
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "layer_types": [*MIXED[:5], "sliding_attention", "full_attention"],
        },
    ),
    # the last layer is global, whatever the pattern says, and two share keys of the first five
    "gemma4 shared": ("gemma4_text", GROUPED | GEMMA4 | {"num_kv_shared_layers": 1}),
    "gemma4_unified": ("gemma4_unified_text", GROUPED | GEMMA4),
    "llama4": ("llama4_text", GROUPED | CHUNKED),
    "llama4 lists": (
        "llama4_text",
        GROUPED
        | CHUNKED
        | {
            "no_rope_layers": [0, 1, 1, 0, 1, 0, 1],
            "layer_types": ["full_attention", "chunked_attention"] * 3 + ["full_attention"],
        },
    ),
    "llama4 whole": (
        "llama4_text",
        GROUPED | CHUNKED | {"attention_chunk_size": None, "use_qk_norm": False},
    ),
    "nemotron": ("nemotron", GROUPED),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 60,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 15,
            "state_size": 7,
            "n_groups": 2,
            "conv_kernel": 3,
            "chunk_size": 8,
            "vocab_size": 31,
        },
    ),
    "nemotron_h": ("nemotron_h", MAMBA | {"hybrid_override_pattern": "M-*M-*"}),
    "nemotron_h names": (
        "nemotron_h",
        MAMBA | {"layers_block_type": ["mamba", "attention", "moe", "linear_attention", "mlp"]},
    ),
    "lfm2": ("lfm2", GROUPED | {"full_attn_idxs": [1, 4], "conv_L_cache": 4}),
    "lfm2_moe": (
        "lfm2_moe",
        GROUPED
        | {
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]
            + ["conv"] * 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 11,
        },
    ),
    "qwen2_moe": ("qwen2_moe", GROUPED | EXPERTS | {"num_experts": 2}),
    "qwen2_moe windows": (
        "qwen2_moe",
        GROUPED
        | EXPERTS
        | {
            "num_experts": 2,
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 4,
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", GROUPED | EXPERTS | LINEAR | {"num_experts": 2}),
    "minimax_m2": ("minimax_m2", GROUPED | EXPERTS | {"head_dim": 22}),
    "qwen2_vl": ("qwen2_vl_text", GROUPED),
    "qwen2_5_vl windows": (
        "qwen2_5_vl_text",
        GROUPED | {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 4},
    ),
    "qwen3_vl": ("qwen3_vl_text", GROUPED | {"head_dim": 22}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", GROUPED | EXPERTS | {"num_experts": 2}),
    "whisper": (
        "whisper",
        {
            "d_model": 60,
            "encoder_layers": 2,
            "encoder_attention_heads": 5,
            "decoder_layers": 3,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 17,
            "decoder_ffn_dim": 17,
            "vocab_size": 31,
            "pad_token_id": 0,
            "max_target_positions": 43,
        },
    ),
    "deepseek_v32": (
        "deepseek_v32",
        MLA | {"index_n_heads": 3, "index_head_dim": 7, "index_topk": 12},
    ),
    "axk2": ("axk2", MLA | {"index_n_heads": 3, "index_head_dim": 7, "index_topk": 12}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        MLA | {"index_n_heads": 3, "index_head_dim": 7, "index_topk": 12, "index_topk_freq": 2},
    ),
    "hy_v4": (
        "hy_v4",
        MLA
        | {"index_n_heads": 3, "index_head_dim": 7, "index_topk": 12}
        | {"indexer_types": ["full", "shared", "shared"], "pad_token_id": 0},
    ),
    "gpt_oss": (
        "gpt_oss",
        GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 19},
    ),
    "gpt_oss layer types": (
        "gpt_oss",
        GROUPED
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 22, "layer_types": MIXED},
    ),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v2 direct query": ("deepseek_v2", MLA | {"q_lora_rank": None}),
    "deepseek_v2 yarn": ("deepseek_v2", MLA | {"rope_scaling": YARN}),
    "deepseek_v3": ("deepseek_v3", MLA),
    "deepseek_v3 direct query": ("deepseek_v3", MLA | {"q_lora_rank": None}),
    "deepseek_v3 yarn": ("deepseek_v3", MLA | {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "glm4_moe_lite yarn": ("glm4_moe_lite", MLA | {"rope_scaling": YARN}),
    "minicpm3": ("minicpm3", MLA),
    "minicpm3 value dim": ("minicpm3", MLA | {"v_head_dim": None, "q_lora_rank": None}),
    "axk1": ("axk1", MLA | CHOSEN),
    "axk1 yarn": ("axk1", MLA | CHOSEN | {"rope_scaling": YARN}),
    "youtu": ("youtu", MLA | {"q_lora_rank": None}),
    # of an even head dim, which its config class asks for
    "mistral4": ("mistral4", MLA | {"qk_nope_head_dim": 14}),
    "mistral4 yarn": ("mistral4", MLA | {"qk_nope_head_dim": 14, "rope_scaling": YARN}),
    "longcat_flash": ("longcat_flash", LONGCAT),
    "longcat_flash yarn": ("longcat_flash", LONGCAT | {"rope_scaling": YARN}),
    "kimi_linear": (
        "kimi_linear",
        DELTA
        | {
            "linear_attn_config": {
                "full_attn_layers": [3, 4, 7],
                "kda_layers": [1, 2, 5, 6],
                "head_dim": 11,
                "num_heads": 3,
                "short_conv_kernel_size": 5,
            }
        },
    ),
    "kimi_linear defaults": ("kimi_linear", DELTA | {"linear_head_dim": 11, "linear_num_heads": 3}),
    "kimi_linear layer types": ("kimi_linear", DELTA | {"layer_types": NEXT_TYPES}),
    "bailing_hybrid": (
        "bailing_hybrid",
        DELTA | CHOSEN | {"head_dim": 11, "short_conv_kernel_size": 5, "layer_group_size": 3},
    ),
    "bailing_hybrid yarn": (
        "bailing_hybrid",
        DELTA | CHOSEN | {"rope_scaling": YARN, "layer_types": NEXT_TYPES},
    ),
    "headwise_mla": ("headwise_mla", OWN_MLA),
    "deepseek_v3 yarn plain": (
        "deepseek_v3",
        MLA | {"rope_scaling": {"type": "yarn", "factor": 40.0}},
    ),
    "ministral": ("ministral", GROUPED | {"head_dim": 22, "sliding_window": 19}),
    "ministral layer types": ("ministral", GROUPED | {"head_dim": 22, "layer_types": MIXED}),
    "ministral3": ("ministral3", GROUPED | {"head_dim": 22}),
    "ministral3 windows": ("ministral3", GROUPED | {"head_dim": 22, "sliding_window": 19}),
    "olmo": ("olmo", GROUPED | {"clip_qkv": 8.0}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", GROUPED | {"sliding_window": 19}),
    "olmo3 layer types": ("olmo3", GROUPED | {"layer_types": MIXED}),
    "olmoe": ("olmoe", GROUPED | {"num_experts": 8}),
    "granite": ("granite", GROUPED | GRANITE),
    "granitemoe": ("granitemoe", GROUPED | GRANITE),
    "granitemoeshared": ("granitemoeshared", GROUPED | GRANITE),
    "granite_swa": ("granite_swa", GROUPED | GRANITE | {"sliding_window": 19}),
    "granitemoe_swa": ("granitemoe_swa", GROUPED | GRANITE | {"layer_types": MIXED}),
    "granitemoehybrid": ("granitemoehybrid", GROUPED | GRANITE | GRANITE_MAMBA),
    "cohere": ("cohere", GROUPED | {"num_key_value_heads": None}),
    "cohere normalised": ("cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2": ("cohere2", GROUPED | {"sliding_window": 19}),
    "cohere2 pattern": ("cohere2", GROUPED | {"sliding_window_pattern": 3}),
    "cohere2_moe": (
        "cohere2_moe",
        GROUPED
        | {
            "head_dim": 22,
            "first_k_dense_replace": 2,
            "prefix_dense_sliding_window_pattern": 2,
            "prefix_dense_intermediate_size": 17,
        },
    ),
    "exaone4": ("exaone4", GROUPED | {"sliding_window": 19, "sliding_window_pattern": 3}),
    "exaone4 full": (
        "exaone4",
        GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 7},
    ),
    "exaone_moe": (
        "exaone_moe",
        GROUPED
        | {"sliding_window": 19, "sliding_window_pattern": "LLG", "layer_types": MIXED}
        | {"num_experts": 8, "moe_intermediate_size": 11},
    ),
    "glm4": ("glm4", GROUPED | {"head_dim": 22}),
    "glm4_moe": ("glm4_moe", GROUPED | GLM_EXPERTS),
    "glm4_moe normalised": (
        "glm4_moe",
        GROUPED | GLM_EXPERTS | {"head_dim": 22, "use_qk_norm": True},
    ),
    "glm4v": ("glm4v_text", GROUPED | {"head_dim": 22}),
    "glm4v_moe": ("glm4v_moe_text", GROUPED | GLM_EXPERTS | {"head_dim": 22}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", GROUPED | {"head_dim": 22}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", GROUPED | {"head_dim": 22, "num_experts": 2}),
    "ernie4_5": ("ernie4_5", GROUPED | {"head_dim": 22}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        GROUPED | {"moe_num_experts": 8, "moe_intermediate_size": 11},
    ),
    "seed_oss": ("seed_oss", GROUPED | {"head_dim": 22}),
    "apertus": ("apertus", GROUPED),
    "arcee": ("arcee", GROUPED),
    "smollm3": ("smollm3", GROUPED | {"sliding_window": 19}),
    "smollm3 windows": ("smollm3", GROUPED | {"use_sliding_window": True, "sliding_window": 19}),
    "smollm3 rotations": (
        "smollm3",
        GROUPED
        | {"use_sliding_window": True, "sliding_window": 19}
        | {"no_rope_layers": [0, 0, 1, 1, 0, 1, 1]},
    ),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 19}),
    "gpt_neox": ("gpt_neox", HEADS),
    "opt": ("opt", HEADS | {"ffn_dim": 17, "word_embed_proj_dim": 55}),
    "mpt": ("mpt", MPT),
    "mpt scale": ("mpt", MPT | {"attn_config": {"softmax_scale": 0.37}}),
    "deepseek_v3 linear rope": (
        "deepseek_v3",
        MLA | {"rope_scaling": {"type": "linear", "factor": 3.0, "mscale_all_dim": 0.5}},
    ),
}


def raw_config(name):
    """The config as a parsed config.json."""
    model_type, fields = CONFIGS[name]
    return {"model_type": model_type, **_copy(fields)}


def stock_config(name):
    """The same as Transformers' config object."""
    model_type, fields = CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoConfig.for_model(model_type, **_copy(fields))


@dataclass
class Stock:
    """What a stock attention module shows of itself; None where it does not show it."""

    module: torch.nn.Module
    query: int
    key: int | None
    value: int | None


@functools.cache
def stock_layers(name):
    """(decoder or only stack, encoder beside it, cross-attention) as lists of Stock."""
    model_type = CONFIGS[name][0]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModel.from_config(stock_config(name))
    if model_type in ("bert", "roberta"):
        layers = model.encoder.layer
        own = [_separate(layer.attention.self, "query", "key", "value") for layer in layers]
        cross = [
            _separate(layer.crossattention.self, "query", "key", "value")
            for layer in layers
            if hasattr(layer, "crossattention")
        ]
        return own, [], cross
    if model_type == "t5":
        encoder, decoder = model.encoder.block, model.decoder.block
        return (
            [_separate(block.layer[0].SelfAttention, "q", "k", "v") for block in decoder],
            [_separate(block.layer[0].SelfAttention, "q", "k", "v") for block in encoder],
            [_separate(block.layer[1].EncDecAttention, "q", "k", "v") for block in decoder],
        )
    if model_type == "whisper":
        names = ("q_proj", "k_proj", "v_proj")
        encoder, decoder = model.encoder.layers, model.decoder.layers
        return (
            [_separate(layer.self_attn, *names) for layer in decoder],
            [_separate(layer.self_attn, *names) for layer in encoder],
            [_separate(layer.encoder_attn, *names) for layer in decoder],
        )
    if model_type in ("gpt2", "gpt_bigcode"):
        own = [_fused(block.attn, block.attn.c_attn.weight.numel() // 55, 55) for block in model.h]
        cross = [
            Stock(block.crossattention, 55, 55, 55)
            for block in model.h
            if hasattr(block, "crossattention")
        ]
        return own, [], cross
    if model_type == "falcon":
        own = [block.self_attention for block in model.h]
        return [_fused(layer, layer.query_key_value.out_features, 84) for layer in own], [], []
    if model_type == "bloom":
        own = [block.self_attention for block in model.h]
        return [_fused(layer, layer.query_key_value.out_features, 55) for layer in own], [], []
    if model_type == "mpt":
        own = [block.attn for block in model.blocks]
        return [_fused(layer, layer.Wqkv.out_features, 55) for layer in own], [], []
    if model_type == "gpt_neox":
        own = [layer.attention for layer in model.layers]
        return [_fused(layer, layer.query_key_value.out_features, 55) for layer in own], [], []
    if "kv_lora_rank" in CONFIGS[name][1]:
        return [_latent(module) for module in _expanding(model)], [], []
    layers = model.decoder.layers if model_type == "opt" else model.layers
    # Granite 4's layers of Mamba-2 have an attention that is None
    modules = [
        getattr(layer, "self_attn", None) or layer.mixer
        for layer in layers
        if getattr(layer, "self_attn", None) is not None
        or getattr(layer, "block_type", "") == "full_attention"
    ]
    if model_type == "phi3":
        sizes = [(at.qkv_proj.out_features, at.o_proj.in_features) for at in modules]
        return [_fused(module, *size) for module, size in zip(modules, sizes)], [], []
    return [_separate(module, "q_proj", "k_proj", "v_proj") for module in modules], [], []


def _separate(module, query, key, value):
    # a layer that shares another's keys has no projections for them, and Qwen3-Next's queries come
    # with a gate of their size
    sizes = [getattr(getattr(module, name, None), "out_features", None) for name in (key, value)]
    gated = type(module).__name__ in (
        *("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"),
    )
    return Stock(module, getattr(module, query).out_features // (2 if gated else 1), *sizes)


def _fused(module, total, query):
    """Query, key and value behind one projection; key and value are equally large."""
    return Stock(module, query, (total - query) // 2, (total - query) // 2)


def _expanding(model):
    """The MLA modules; LongCat has two in a layer."""
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def _latent(module):
    if type(module).__name__ == "HeadwiseMlaAttention":
        return _own_latent(module)
    expanded = module.kv_b_proj.out_features
    nope = module.num_heads * module.qk_nope_head_dim
    rope = module.num_heads * module.qk_rope_head_dim
    if hasattr(module, "q_gate_proj"):  # A.X K2 makes the gates of the heads' outputs by the same
        query = module.q_gate_proj.out_features - module.num_heads * module.v_head_dim
    else:
        own = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        query = own.out_features
    return Stock(module, query, nope + rope, expanded - nope)


def _own_latent(module):
    """Rope queries are made of q_proj's by rope_mix, two numbers for each pair of dims."""
    expanded, rope = module.kv_b_proj.out_features, module.rope_mix.numel()
    value = module.o_proj.in_features
    query = rope + (module.q_proj.out_features if expanded > value else 0)
    return Stock(module, query, expanded - value + rope, value)


def _copy(fields):
    # Config classes write into the nested dicts that they are given.
    return {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}
