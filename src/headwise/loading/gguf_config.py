"""The config that a GGUF header amounts to: every field honoured, or refused by name.

Transformers makes a config of some fields and passes over the others in silence, so that a model
runs with a class's default where the file says something else. Here each field of the
architecture is one that Transformers takes, one that is set or compared here, one that changes no
number, or a reason to refuse the file.
"""

import dataclasses
from typing import Any

from headwise.errors import LoadError
from headwise.loading.gguf_file import BESIDE_FIELDS, GgufFile
from headwise.loading.gguf_rope import ROPE_FIELDS, set_rope

# Fields that no computation depends on, or that the tensors' own shapes state once more.
_HARMLESS = {
    "context_length",
    "tensor_data_layout",
    "vocab_size",
    "block_count",
    "expert_feed_forward_length",
    "nextn_predict_layers",  # their tensors are either passed over by the model's class or refused
}

# The attribute that each field sets, the first one that the config's class has.
_ATTRIBUTES = {
    "context_length": ("n_positions", "max_position_embeddings"),
    "feed_forward_length": ("n_inner", "intermediate_size", "ffn_hidden_size"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
    ),
    "attention.sliding_window": ("sliding_window",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
}

# Values that stand for "none of it", in a model whose class does not know the field.
_NONE_OF_IT: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "feed_forward_length": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (1,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (1,),
    "pooling_type": (0,),
    "residual_scale": (1,),
    "router_logit_softcapping": (0,),
    "ssm.dt_b_c_rms": (False,),
}

# Of these, the classes whose attribute takes effect by itself: Qwen's has a switch beside it.
_WINDOWED = {"gemma2", "gemma3_text", "gemma4_text", "phi3", "gpt_oss", "starcoder2"}

_TWO_ROTATIONS = {"rope.freq_base_swa", "rope.dimension_count_swa"}
_TWO_SIZES = {
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
}

_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}

# Gemma's largest models scale scores by E/H, the others by D; no field says so, so llama.cpp, too,
# tells them by their number of blocks.
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}


def gguf_config(gguf: GgufFile) -> Any:
    """The Transformers config of a GGUF file.

    Raises:
        LoadError: an architecture that Transformers cannot read, or a field that it would ignore;
            a damaged header makes Transformers raise whatever it likes (`one_line` is for that).
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    file = gguf.path
    said, _ = PreTrainedConfig.get_config_dict(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    if gguf.architecture == "llama":
        # Of a file whose name is "mistral" Transformers makes a Mistral with a window of 4096 that
        # the file does not say, and then finds no names for its tensors.
        said["model_type"] = "llama"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        said.setdefault(name, None)  # the class's default is one checkpoint's
    kind = said["model_type"]
    if kind not in CONFIG_MAPPING:
        raise LoadError(f"{file} has architecture {kind!r}, which Transformers does not read")
    config_class = CONFIG_MAPPING[kind]
    has = {field.name for field in dataclasses.fields(config_class)}
    has |= set(config_class.attribute_map)
    chosen = _chosen(gguf, has, said)
    said |= chosen
    set_rope(gguf, said)
    config = config_class.from_dict(said)
    # as a dictionary: a config of layers that differ (Gemma 4) refuses to be asked for one
    made = config.to_dict()
    for name, value in chosen.items():
        taken = made.get(config.attribute_map.get(name, name))
        if taken != value:
            raise LoadError(
                f"{file} says {name} {value!r}, which Transformers' {kind} takes for {taken!r}; "
                "give the original model's folder"
            )
    _check_fields(gguf, config, has)
    return config


def _chosen(gguf: GgufFile, has: set[str], said: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the config as the file says, in place of what Transformers makes of it."""
    chosen: dict[str, Any] = {}
    kind = said["model_type"]
    for field, names in _ATTRIBUTES.items():
        value, name = gguf.get(field), _attribute(names, has)
        if value is None or name is None or isinstance(value, list):
            continue
        if name == "sliding_window" and kind not in _WINDOWED:
            continue
        if field == "feed_forward_length" and value == 0:
            continue  # Mamba's, which has none
        nothing = field in _NONE_OF_IT and type(value) is not bool and value == 0
        chosen[name] = None if nothing and not name.startswith(("num_", "hidden_")) else value
    heads, width = gguf.get("attention.head_count"), gguf.get("embedding_length")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        if gguf.get("attention.head_count_kv") is None and "num_key_value_heads" in has:
            chosen["num_key_value_heads"] = heads
        size = gguf.get("attention.key_length")
        if kind == "gemma4_text":
            pass  # its key_length is that of full attention, and Transformers takes it so
        elif size is not None and ("head_dim" in has or size != width // heads):
            chosen["head_dim"] = size
        elif size is None and "head_dim" in has and "head_dim" not in said:
            chosen["head_dim"] = width // heads  # the class's default is one checkpoint's
        if "query_pre_attn_scalar" in has:
            scale = gguf.get("attention.scale")
            by_width = (gguf.architecture, gguf.get("block_count")) in _SCALED_BY_WIDTH
            chosen["query_pre_attn_scalar"] = width // heads if by_width or not size else size
            if scale:
                chosen["query_pre_attn_scalar"] = round(scale**-2)
    if kind == "gemma4_text" and gguf.get("attention.key_length_swa"):
        chosen["head_dim"] = gguf.get("attention.key_length_swa")
    if kind == "falcon" and gguf.get("attention.head_count_kv") == heads:
        chosen["multi_query"] = heads == 1
    pattern = gguf.get("attention.sliding_window_pattern")
    blocks = gguf.get("block_count")
    if pattern is not None and "layer_types" in has and kind in _WINDOWED:
        if isinstance(pattern, int):
            pattern = [bool((layer + 1) % pattern) if pattern else False for layer in range(blocks)]
        chosen["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in pattern
        ]
    chosen["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for name, parts in _BIASES.items():
        if name in has and all(f"blk.0.{part}.bias" in gguf.tensors for part in parts):
            chosen[name] = True
    return chosen


def _check_fields(gguf: GgufFile, config: Any, has: set[str]) -> None:
    heads = gguf.get("attention.head_count")
    width = gguf.get("embedding_length")
    for name in ("block_count", "embedding_length"):
        if gguf.get(name) is None:
            raise LoadError(f"{gguf.path} does not say {gguf.architecture}.{name}")
    if gguf.architecture == "llama" and gguf.get("attention.head_count_kv") is None:
        # as many as there are heads; but Transformers' reader then leaves queries and keys in
        # the order that rotates other pairs
        raise LoadError(
            f"{gguf.path} does not say llama.attention.head_count_kv, which Transformers' reader "
            "needs: convert the original model anew"
        )
    eps = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    if all(gguf.get(name) is None for name in eps):
        raise LoadError(f"{gguf.path} does not say {gguf.architecture}.{eps[0]}")
    kind, size = config.model_type, config.to_dict().get("head_dim")
    if size is None and heads:
        size = width // heads
    right = _NONE_OF_IT | {
        "attention.head_count": (0,),
        "attention.head_count_kv": (heads,),
        "attention.key_length": (size,),
        "attention.value_length": (size,),
        "attention.scale": (0, *((size**-0.5,) if size else ())),
        "rope.freq_base_swa": (gguf.get("rope.freq_base"),),
        "rope.dimension_count_swa": (gguf.get("rope.dimension_count"),),
        "expert_gating_func": (2,) if kind == "minimax_m2" else (0, 1),
    }
    free = _HARMLESS | ROPE_FIELDS | _taken(gguf)
    free |= {name for name, names in _ATTRIBUTES.items() if _attribute(names, has)}
    if kind == "bloom":
        right["attention.max_alibi_bias"] = (8,)
    if kind in ("gemma3_text", "gemma4_text"):
        free |= _TWO_ROTATIONS  # check_rope compares them
    if kind == "gemma4_text":
        free |= _TWO_SIZES  # the tensors' shapes state them
    if "query_pre_attn_scalar" in has:
        free.add("attention.scale")
    if kind not in _WINDOWED:
        free.discard("attention.sliding_window")
        free.add("attention.sliding_window_pattern")  # nothing where there is no window
    elif "layer_types" in has:
        free.add("attention.sliding_window_pattern")
    for name in _given(gguf):
        value = gguf.get(name)
        if name in free or name.startswith(BESIDE_FIELDS):
            continue
        if any(_same(value, one) for one in right.get(name, ())):
            continue
        if name == "attention.sliding_window" and value >= gguf.get("context_length", 0) > 0:
            continue
        shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
        raise LoadError(
            f"{gguf.path} sets {gguf.architecture}.{name} to {shown}, which Transformers' {kind} "
            "does not do: the model would compute something else; give the original model's folder"
        )


def _taken(gguf: GgufFile) -> set[str]:
    """The fields that Transformers itself makes the config of."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    if gguf.architecture in GGUF_CONFIG_ARCHS:
        seen = _Seen(gguf.fields)
        GGUF_CONFIG_ARCHS[gguf.architecture](seen, tuple(gguf.tensors))
        start = f"{gguf.architecture}."
        return {key.removeprefix(start) for key in seen.keys_read if key.startswith(start)}
    names = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
    names["minimax-m2"] = "minimax_m2"
    mapping = GGUF_CONFIG_MAPPING.get(names.get(gguf.architecture, gguf.architecture), {})
    return {name for name, attribute in mapping.items() if attribute is not None}


class _Seen(dict[str, Any]):
    """A dictionary that remembers which keys were asked for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


def _given(gguf: GgufFile) -> list[str]:
    start = f"{gguf.architecture}."
    return sorted(key.removeprefix(start) for key in gguf.fields if key.startswith(start))


def _attribute(names: tuple[str, ...], has: set[str]) -> str | None:
    return next((name for name in names if name in has), None)


def _same(value: Any, right: Any) -> bool:
    if isinstance(value, bool) or isinstance(right, bool) or not isinstance(value, int | float):
        return bool(value == right)
    return right is not None and abs(value - right) <= 1e-6 * abs(right)  # stored as float32
