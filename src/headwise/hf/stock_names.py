"""The names of Transformers that a release may move, each with what it is for.

Take them from here: `from headwise.hf.stock_names import sdpa_mask`. They are looked up in
Transformers when they are taken, so that what is for GGUF files alone costs nothing else anything.
Names that Transformers documents at its top (`AutoModelForCausalLM`) are imported where they are
used. A test holds both tables below against the installed release, name by name.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from headwise.errors import UnsupportedError

# What models call the cache that they take and give; before Transformers 5.24 by its old name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"

# Of each module what is imported.
IMPORTED: Mapping[str, Mapping[str, str]] = {
    "transformers.cache_utils": {
        "Cache": "what a model takes for its cache",
        "CacheLayerMixin": "the base of our cache layers",
        "DynamicCache": "the cache whose layers ours replace",
        "DynamicLayer": "its layer of full attention, which ours turns into for gradients",
        "DynamicSlidingWindowLayer": "its layer with a window, likewise",
        "EncoderDecoderCache": "two caches in one, of which the first is replaced",
        "LinearAttentionAndFullAttentionLayer": "a layer of both, whose tokens ours holds",
        "LinearAttentionCacheLayerMixin": "a layer that holds a state: planned, never replaced",
        "LinearAttentionLayer": "its states, which ours of both keeps as they are",
        "StaticCache": "what the benchmark compares with",
        "get_layer_types_and_kwargs": "the kinds of layers, for reading a prompt in chunks",
    },
    "transformers.integrations.moe": {
        "ALL_EXPERTS_FUNCTIONS": "the ways in which experts are computed, some of them a user's",
    },
    "transformers.masking_utils": {
        "AttentionMaskInterface": "where our mask function is registered",
        "causal_mask_function": "the default of our mask function's arguments",
        "sdpa_mask": "the boolean mask, where our operators need one",
    },
    "transformers.utils.import_utils": {
        "is_torchdynamo_exporting": "whether a mask can be looked at",
        "is_tracing": "whether a mask can be looked at",
    },
    "transformers.utils.output_capturing": {
        "_active_collector": "whether the running forward was asked for attention weights",
    },
    "transformers.integrations.sdpa_attention": {
        "sdpa_attention_forward": "attention with dropout",
    },
    "transformers.pytorch_utils": {
        "Conv1D": "the product of GPT-2, with its weight stored transposed",
    },
    "transformers.modeling_outputs": {
        "BaseModelOutput": "what an encoder has seen, for a plan that is verified",
    },
    "transformers.modeling_utils": {
        "ALL_ATTENTION_FUNCTIONS": "the attention functions that `headwise_mla` may run on",
    },
    "transformers.initialization": {
        "copy_": "weights of `headwise_mla` that are not loaded",
        "normal_": "weights of `headwise_mla` that are not loaded",
    },
    "transformers.conversion_mapping": {
        "get_checkpoint_conversion_mapping": "how DeepSeek's weights are read",
        "register_checkpoint_conversion_mapping": "that DeepSeek as MHA is read so too",
    },
    "transformers.models.llama.modeling_llama": {
        "LlamaDecoderLayer": "`headwise_mla` is Llama but for its attention",
        "LlamaModel": "likewise",
        "LlamaPreTrainedModel": "likewise",
        "LlamaRMSNorm": "likewise",
        "LlamaRotaryEmbedding": "likewise, and the rotation of converted layers",
        "apply_rotary_pos_emb": "the rotation of converted layers",
        "eager_attention_forward": "the eager attention of `headwise_mla`",
    },
    "transformers.models.glm.modeling_glm": {
        "GlmRotaryEmbedding": "the rotation of a `headwise_mla` written as MHA",
    },
    "transformers.models.falcon.modeling_falcon": {
        "FALCON_ATTENTION_CLASSES": "where Falcon refuses our name with a reason",
    },
    "transformers.models.gpt_neo.modeling_gpt_neo": {
        "GPT_NEO_ATTENTION_CLASSES": "where GPT-Neo refuses our name with a reason",
    },
    "transformers.core_model_loading": {
        "WeightConverter": "which weight a tensor of a GGUF file fills, and what is made of it",
        "WeightRenaming": "likewise",
        "rename_source_key": "likewise",
    },
    "transformers.integrations.gguf": {
        "GGUF_CONFIG_ARCHS": "which fields of a GGUF file Transformers makes a config of",
        "load_gguf_state_dict": "tensors of a GGUF file, each read when it is asked for",
        "read_gguf_metadata": "the fields of a GGUF file",
    },
    "transformers.integrations.gguf.reader": {
        "GgufHeader": "the tensors of a GGUF file, unread",
    },
    "transformers.integrations.gguf.utils": {
        "get_gguf_conversion_mapping": "which weight a tensor of a GGUF file fills",
        "is_gguf_arch_supported": "whether the newer of two readers takes a GGUF file",
    },
    "transformers.integrations.gguf.dequant": {
        "GGML_BLOCK": "the block formats that the GGUF reader knows, with Q5 added",
        "GGML_NAME": "likewise",
        "_DEQUANT": "likewise",
    },
    "transformers.integrations.ggml": {
        "GGUF_CONFIG_MAPPING": "which fields of a GGUF file the older reader takes",
    },
    "transformers.modeling_gguf_pytorch_utils": {
        "TENSOR_PROCESSORS": "which weight a tensor fills and with what, by the older reader",
        "TensorProcessor": "likewise",
        "get_gguf_hf_weights_map": "likewise",
    },
}

# Of each object what is asked by name: of a class, of what it makes, or of a module.
ASKED: Mapping[str, Mapping[str, str]] = {
    "transformers.PreTrainedModel": {
        "_can_record_outputs": "how `headwise_mla` says where its attention weights are",
        "_can_set_attn_implementation": "whether a class is on the attention interface",
        "_can_set_experts_implementation": "overridden by DeepSeek as MHA, whose experts are stock",
        "_from_config": "a model on the meta device, for a plan",
        "_init_weights": "overridden by `headwise_mla`",
        "_is_stateful": "whether a model has states, which chunks of a prompt would lose",
        "_keys_to_ignore_on_load_missing": "weights that a file may lack",
        "_keys_to_ignore_on_load_unexpected": "tensors that a file may have beside the model's",
        "_no_split_modules": "the layers of `headwise_mla`, which stay on one device",
        "_supports_flash_attn": "that `headwise_mla` is too wide for it",
        "_supports_flex_attn": "that `headwise_mla` is too wide for it",
        "_supports_sdpa": "whether stock runs a class on SDPA",
        "set_attn_implementation": "our name, given to a model's parts",
    },
    "transformers.generation.GenerationMixin": {
        "_prefill": "replaced by `attach`, so that sequences of one prompt share what is read",
        "_prepare_cache_for_generation": "replaced by `attach`, so that `generate` takes our cache",
        "_prepare_position_ids_for_generation": "the positions of a single step",
        "_supports_default_dynamic_cache": "whether a family without a reader makes a DynamicCache",
        "prepare_inputs_for_generation": "what a single step is given",
    },
    "transformers.PreTrainedConfig": {
        "_attn_implementation": "which attention a config names",
        "_attn_implementation_internal": "the same, set without a check of the class's file",
        "attribute_map": "the other names of a config's fields, for GGUF files",
        "get_text_config": "the part of a config that decodes",
        "sub_configs": "the configs in a config",
    },
    "transformers.GenerationConfig": {
        "is_assistant": "whether a cache is made for assisted decoding",
        "prefill_chunk_size": "the chunks that a prompt is read in",
    },
    "transformers.DynamicCache": {
        "activate_past_recording": "that windows keep what assisted decoding may crop",
        "layer_class_to_replicate": "what makes the layers of a cache without a config",
        "layers": "the layers, which ours replace",
        "offloading": "whether the cache moves between devices, and stays stock's",
    },
    "transformers.cache_utils.DynamicSlidingWindowLayer": {
        "cumulative_length": "tokens seen, set when ours turns into it",
        "record_past": "likewise",
        "sliding_window": "the window of our layer",
    },
    "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention": {
        "expand_kv": "replaced by `attach`, so that latents reach our attention function",
    },
    "transformers.core_model_loading.WeightConverter": {
        "add_tensor": "the tensors that a weight is made of",
        "convert": "the weight, made",
        "source_patterns": "which tensors it is for",
    },
    "transformers.modeling_gguf_pytorch_utils.TensorProcessor": {
        "process": "what the older reader does to a tensor",
    },
    "transformers.utils.logging": {
        "set_tqdm_hook": "the bar of loading weights, led to ours",
    },
    "transformers.modeling_gguf_pytorch_utils": {
        "tqdm": "the bar of the GGUF reader, led to ours",
    },
}

_MODULES = {name: module for module, names in IMPORTED.items() for name in names}


def __getattr__(name: str) -> Any:
    """One of `IMPORTED`.

    Raises:
        UnsupportedError: the installed Transformers does not have it.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    try:
        return getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(
            "transformers"
        ):
            raise  # of a package that is not installed
        raise UnsupportedError(
            f"Transformers {transformers.__version__} has no {module}.{name} "
            f"({IMPORTED[module][name]}): install a release that headwise is tested with"
        ) from error
