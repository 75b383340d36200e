"""The config that a GGUF header amounts to: every field honoured, or refused by name.

Transformers makes a config of some fields and passes over the others in silence, so that a model
runs with a class's default where the file says something else. Here each field of the
architecture is one that Transformers takes, one that is set or compared here, one that changes no
number, or a reason to refuse the file.
"""

import dataclasses
from collections import UserDict
from typing import Any

from headwise.errors import LoadError
from headwise.loading.gguf.fields import FIELDS
from headwise.loading.gguf.file import BESIDE_FIELDS, GgufFile
from headwise.loading.gguf.rotation import ROPE_FIELDS, set_rope

_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
_EPS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_PATTERN = "attention.sliding_window_pattern"


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
    model_type = said["model_type"] = gguf.architecture.model_type or said["model_type"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        said.setdefault(name, None)  # the class's default is one checkpoint's
    if model_type not in CONFIG_MAPPING:
        raise LoadError(f"{file} has architecture {model_type!r}, which Transformers does not read")
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)}
    names |= set(config_class.attribute_map)
    stated = _attributes(gguf, names, said) | _window(gguf, names) | _heads(gguf, names, said)
    said |= stated
    set_rope(gguf, said, names)
    config = config_class.from_dict(said)
    # as a dictionary: a config of layers that differ (Gemma 4) refuses to be asked for one
    made = config.to_dict()
    for name, value in stated.items():
        taken = made.get(config.attribute_map.get(name, name))
        if taken != value:
            raise LoadError(
                f"{file} says {name} {value!r}, which Transformers' {model_type} takes for "
                f"{taken!r}; give the original model's folder"
            )
    _check_present(gguf)
    _check_fields(gguf, model_type, made.get("head_dim"), names)
    return config


def _attributes(gguf: GgufFile, names: set[str], said: dict[str, Any]) -> dict[str, Any]:
    """Attributes that fields and tensors state one by one, in place of what Transformers makes."""
    stated: dict[str, Any] = {}
    for name, field in FIELDS.items():
        value, attribute = gguf.get(name), field.attribute(names)
        if value is None or attribute is None or isinstance(value, list):
            continue
        if attribute == "sliding_window" and not _windowed(names):
            continue
        if name == "feed_forward_length" and value == 0:
            continue  # Mamba's, which has none
        is_none = field.neutral and type(value) is not bool and value == 0
        counts = attribute.startswith(("num_", "hidden_"))
        stated[attribute] = None if is_none and not counts else value
    stated["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for name, parts in _BIASES.items():
        if name in names and all(f"blk.0.{part}.bias" in gguf.tensors for part in parts):
            stated[name] = True
    return stated


def _windowed(names: set[str]) -> bool:
    """Whether a window of the config takes effect by itself: Qwen's has a switch beside it."""
    return "sliding_window" in names and "use_sliding_window" not in names


def _window(gguf: GgufFile, names: set[str]) -> dict[str, Any]:
    """Which layers slide."""
    pattern, blocks = gguf.get(_PATTERN), gguf.get("block_count")
    if pattern is None or "layer_types" not in names or not _windowed(names):
        return {}
    if isinstance(pattern, int):
        pattern = [bool((layer + 1) % pattern) if pattern else False for layer in range(blocks)]
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"layer_types": kinds}


def _heads(gguf: GgufFile, names: set[str], said: dict[str, Any]) -> dict[str, Any]:
    """Numbers and sizes of heads, and the scale of their scores."""
    stated: dict[str, Any] = {}
    heads, width = gguf.get("attention.head_count"), gguf.get("embedding_length")
    kv_heads = gguf.get("attention.head_count_kv")
    if "multi_query" in names and kv_heads == heads:
        stated["multi_query"] = heads == 1
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0):
        return stated
    if kv_heads is None and "num_key_value_heads" in names:
        stated["num_key_value_heads"] = heads
    size = gguf.get(gguf.architecture.head_dim)
    if size is not None and ("head_dim" in names or size != width // heads):
        stated["head_dim"] = size
    elif size is None and "head_dim" in names and "head_dim" not in said:
        stated["head_dim"] = width // heads  # the class's default is one checkpoint's
    if "query_pre_attn_scalar" in names:
        by_width = gguf.architecture.scaled_by_width == gguf.get("block_count")
        scale, base = gguf.get("attention.scale"), width // heads if by_width or not size else size
        stated["query_pre_attn_scalar"] = round(scale**-2) if scale else base
    return stated


def _check_present(gguf: GgufFile) -> None:
    """Refuse a file that leaves out what no config can do without."""
    needs = ["block_count", "embedding_length", *gguf.architecture.needs]
    if all(gguf.get(name) is None for name in _EPS):
        needs.append(_EPS[0])
    for name in needs:
        if gguf.get(name) is None:
            raise LoadError(
                f"{gguf.path} does not say {gguf.architecture.name}.{name}, which Transformers' "
                "reader needs: convert the original model anew"
            )


def _check_fields(gguf: GgufFile, model_type: str, size: int | None, names: set[str]) -> None:
    """Refuse a field that the model would not compute with; `size` is the config's head_dim."""
    architecture, heads = gguf.architecture, gguf.get("attention.head_count")
    if size is None and heads:
        size = gguf.get("embedding_length") // heads
    neutral = {name: field.neutral for name, field in FIELDS.items()} | {
        "attention.head_count_kv": (heads,),
        "attention.key_length": (size,),
        "attention.value_length": (size,),
        "attention.scale": (0, *((size**-0.5,) if size else ())),
        "rope.freq_base_swa": (gguf.get("rope.freq_base"),),
        "rope.dimension_count_swa": (gguf.get("rope.dimension_count"),),
        **architecture.neutral,
    }
    free = ROPE_FIELDS | architecture.passes | _taken(gguf, model_type)
    free |= {name for name, field in FIELDS.items() if field.harmless or field.attribute(names)}
    if "query_pre_attn_scalar" in names:
        free.add("attention.scale")
    if not _windowed(names):
        free.discard("attention.sliding_window")
    if not _windowed(names) or "layer_types" in names:
        free.add(_PATTERN)  # nothing where there is no window
    prefix = f"{architecture.name}."
    for key in sorted(key for key in gguf.fields if key.startswith(prefix)):
        name, value = key.removeprefix(prefix), gguf.fields[key]
        if name in free or name.startswith(BESIDE_FIELDS):
            continue
        if any(_same(value, one) for one in neutral.get(name, ())):
            continue
        if name == "attention.sliding_window" and value >= gguf.get("context_length", 0) > 0:
            continue
        shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
        gguf.refuse(f"sets {key} to {shown}, which Transformers' {model_type} does not do")


def _taken(gguf: GgufFile, model_type: str) -> set[str]:
    """The fields that Transformers itself makes the config of."""
    from headwise.hf.stock_names import GGUF_CONFIG_ARCHS, GGUF_CONFIG_MAPPING

    architecture = gguf.architecture.name
    if architecture in GGUF_CONFIG_ARCHS:
        fields = _Recorded(gguf.fields)
        GGUF_CONFIG_ARCHS[architecture](fields, tuple(gguf.tensors))
        return {key.removeprefix(f"{architecture}.") for key in fields.read}
    # some stand under the model_type, Gemma's under the name that a file has
    mapping = GGUF_CONFIG_MAPPING.get(model_type) or GGUF_CONFIG_MAPPING.get(architecture, {})
    return {name for name, attribute in mapping.items() if attribute is not None}


class _Recorded(UserDict[str, Any]):
    """A dictionary that remembers which keys were read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.read: set[str] = set()
        super().__init__(fields)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def _same(value: Any, right: Any) -> bool:
    if isinstance(value, bool) or isinstance(right, bool) or not isinstance(value, int | float):
        return bool(value == right)
    return right is not None and abs(value - right) <= 1e-6 * abs(right)  # stored as float32
