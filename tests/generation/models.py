"""Random models whose prompt may not be cut anywhere, or may: each the same at every call."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import families

# Where LongRoPE changes its factors, and what dynamic NTK's frequencies were made for.
LIMIT = 41

_SIZES: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 4 * LIMIT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 7.0, 10.0],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_PER_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": DYNAMIC,
}
_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_ATTENTION_AND_MAMBA = ["mamba", "attention", "mamba"]

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3-longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT},
    ),
    "llama-longrope": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": LONGROPE}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
    ),
    "gemma3-dynamic": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 13,
            "layer_types": families.HYBRID,
            "rope_parameters": _PER_LAYER,
            "max_position_embeddings": LIMIT,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {"num_hidden_layers": 4, "head_dim": 10, **_LINEAR, **_EXPERTS},
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {"num_hidden_layers": 4, "head_dim": 16, **_LINEAR},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"full_attn_idxs": [1], "block_multiple_of": 8},
    ),
    "bamba": ("BambaForCausalLM", "BambaConfig", {"attn_layer_indices": [1], **_MAMBA}),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {"head_dim": 8, "mamba_d_ssm": 96, **_MAMBA},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {"layer_types": _ATTENTION_AND_MAMBA, "shared_intermediate_size": 32, **_MAMBA},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"lru_width": 48, "attention_window_size": 13},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 1, 0],
        },
    ),
}
WHOLE = tuple(_MODELS)
"""Models that read a prompt in one piece."""
CUT = ("llama-gqa", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3-yarn")
"""Some that read it in chunks when headwise runs them."""


def make(name: str, **changes: Any) -> Any:
    """The random model, ready for a prompt of hundreds of tokens."""
    if name in CUT:
        return families.make(name, **({"max_position_embeddings": 700} | changes))
    model_class, config_class, arguments = _MODELS[name]
    config = getattr(hf, config_class)(**(_SIZES | arguments | changes))
    torch.manual_seed(11)
    return getattr(hf, model_class)(config).eval()


def stock_tokens(made: Callable[[], Any], prompt: list[int], count: int, **options: Any) -> list:
    """What `model.generate` of a model that has just been made writes after a prompt."""
    ids = torch.tensor([prompt])
    found = made().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        pad_token_id=0,
        **({"do_sample": False} | options),
    )
    return found[0, len(prompt) :].tolist()
