"""A small random model for every family on Transformers' attention interface.

Weights are drawn with a range of 0.2, so that logits differ by whole units and greedy tokens are
not near-ties; dims are distinct, so that a transposed axis cannot pass.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
import transformers as hf

import headwise.hf as own

VOCABULARY = 97
WINDOW = 7


def _decoder(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **changes,
    }


def _gpt2(**changes: Any) -> dict[str, Any]:
    names = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, "vocab_size": VOCABULARY}
    names |= {"initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
    return names | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} | changes


def _encoder() -> dict[str, Any]:
    return _decoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _mla(**changes: Any) -> dict[str, Any]:
    return _decoder(
        num_key_value_heads=6,
        kv_lora_rank=20,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=14,
        q_lora_rank=None,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        **changes,
    )


def _dense_mla(**changes: Any) -> dict[str, Any]:
    """Of two layers and no experts: what is theirs is in the attention."""
    return _mla() | {"num_hidden_layers": 2, "first_k_dense_replace": 2} | changes


def _longcat() -> dict[str, Any]:
    """One layer, which attends twice and has experts beside."""
    own = {"num_hidden_layers", "intermediate_size", "moe_intermediate_size", "num_experts_per_tok"}
    return {name: value for name, value in _mla().items() if name not in own} | {
        "num_layers": 1,
        "head_dim": 8,
        "q_lora_rank": 16,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 1,
    }


_DELTA = ["linear_attention", "full_attention"]


def _falcon(**changes: Any) -> dict[str, Any]:
    # FalconLinear's weights are drawn with initializer_range too
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_position_embeddings": 256,
        **changes,
    }


_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
_BY_POSITION = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-gqa": ("LlamaForCausalLM", "LlamaConfig", _decoder()),
    "llama-mha": ("LlamaForCausalLM", "LlamaConfig", _decoder(num_key_value_heads=6)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _decoder(sliding_window=WINDOW)),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _decoder(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=10)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _decoder(head_dim=10, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _decoder(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        _decoder(sliding_window=WINDOW, rope_parameters=_HALF_ROTARY),
    ),
    "glm": (
        "GlmForCausalLM",
        "GlmConfig",
        _decoder(head_dim=20, rope_parameters=_HALF_ROTARY),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _decoder(
            head_dim=10,
            sliding_window=WINDOW,
            query_pre_attn_scalar=13,
            attn_logit_softcapping=5.0,
            # what it is: before 5.22 stock loads it with SDPA, which leaves out the cap
            attn_implementation="eager",
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _decoder(
            num_key_value_heads=1,
            head_dim=10,
            sliding_window=WINDOW,
            query_pre_attn_scalar=13,
            layer_types=HYBRID,
        ),
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        _decoder(
            num_hidden_layers=5,
            head_dim=10,
            sliding_window=WINDOW,
            layer_types=[*HYBRID, *HYBRID[:2]],
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCABULARY,
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _decoder(
            head_dim=10,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=HYBRID,
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2()),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _gpt2(multi_query=True)),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _mla(topk_method="group_limited_greedy"),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _mla()),
    "deepseek_v3-yarn": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _mla() | {"q_lora_rank": 16, "rope_parameters": _YARN},
    ),
    "deepseek_v2-mha": (
        "DeepseekV2MhaForCausalLM",
        "DeepseekV2MhaConfig",
        _mla(topk_method="group_limited_greedy"),
    ),
    "deepseek_v3-mha": (
        "DeepseekV3MhaForCausalLM",
        "DeepseekV3MhaConfig",
        _mla() | {"q_lora_rank": 16, "rope_parameters": _YARN},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        _mla() | {"q_lora_rank": 16, "n_group": 1},
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        _mla() | {"q_lora_rank": 16, "scale_emb": 1, "dim_model_base": None},
    ),
    "axk1": ("AXK1ForCausalLM", "AXK1Config", _dense_mla(q_lora_rank=16)),
    "youtu": (
        "YoutuForCausalLM",
        "YoutuConfig",
        _dense_mla(embedding_initializer_range=0.2, tie_word_embeddings=False),
    ),
    # the query grows every four tokens
    "mistral4": (
        "Mistral4ForCausalLM",
        "Mistral4Config",
        _dense_mla(rope_parameters=_YARN | _BY_POSITION),
    ),
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", _longcat()),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        _dense_mla(layer_types=_DELTA, linear_head_dim=10, linear_num_heads=3),
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        _dense_mla(layer_types=_DELTA, head_dim=10),
    ),
    # in every layer other sizes, and one whose keys are rotated whole
    "headwise_mla": (
        "HeadwiseMlaForCausalLM",
        "HeadwiseMlaConfig",
        _decoder(
            num_key_value_heads=6,
            head_dim=10,
            kv_lora_rank=[20, 12, 24],
            qk_rope_head_dim=[8, 14, 6],
            qk_nope_head_dim=[10, 0, 10],
            v_head_dim=14,
            attention_scale=0.3,
            query_key_bias=True,
        ),
    ),
    "falcon-7b": ("FalconForCausalLM", "FalconConfig", _falcon(parallel_attn=True)),
    "falcon-40b": (
        "FalconForCausalLM",
        "FalconConfig",
        _falcon(new_decoder_architecture=True, num_kv_heads=2),
    ),
    "falcon-rw": (
        "FalconForCausalLM",
        "FalconConfig",
        _falcon(multi_query=False, alibi=True, parallel_attn=False, bias=True),
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "n_layer": 3,
            "n_head": 6,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 10,
            "d_ff": 64,
            "num_layers": 3,
            "num_heads": 6,
            "dropout_rate": 0.0,
            "initializer_factor": 2.0,
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
    ),
    "bert": ("BertModel", "BertConfig", _encoder()),
    "roberta": ("RobertaModel", "RobertaConfig", _encoder()),
}

# T5's random models mostly repeat one token, or have scores of thousands, which magnify rounding;
# this seed gives one that does neither.
_SEEDS = {"t5": 24}

ENCODERS = ("bert", "roberta")
DECODERS = tuple(name for name in _MODELS if name not in (*ENCODERS, "t5"))
GENERATORS = (*DECODERS, "t5")
FAMILIES = tuple(_MODELS)
# DeepSeek's attention again, but for a change beside it: some tests of them are in `make sweep`.
KIN = ("axk1", "youtu", "mistral4", "longcat_flash", "kimi_linear", "bailing_hybrid")
MLA = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v3-yarn", "glm4_moe_lite", "minicpm3"),
    *KIN,
    "headwise_mla",
)
# Half of their layers are linear attention, which stays with Transformers.
LINEAR = ("kimi_linear", "bailing_hybrid")
# Not on Transformers' attention interface: the forward of their modules is replaced.
OWN_FORWARD = ("falcon-7b", "falcon-40b", "falcon-rw", "bloom")


def all_but_sweep(families: Iterable[str], sweep: Collection[str]) -> list[Any]:
    """Parameters of a test: those of `sweep` run in `make sweep` alone."""
    return [
        pytest.param(name, marks=pytest.mark.sweep if name in sweep else ()) for name in families
    ]


def make(family: str, **changes: Any) -> Any:
    """The random model of `family`, the same at every call."""
    model_class, config_class, arguments = _MODELS[family]
    torch.manual_seed(_SEEDS.get(family, 11))
    library: Any = own if hasattr(own, config_class) else hf
    if not hasattr(library, config_class):
        pytest.skip(f"Transformers {hf.__version__} has no {model_class}")
    config = getattr(library, config_class)(**(arguments | changes))
    return getattr(library, model_class)(config).eval()
