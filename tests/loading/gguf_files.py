"""A stock model's weights written as GGUF, as llama.cpp's converter does: names, order, offsets."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cli.checkpoints import VOCAB, symbols_of_tokens

# Dims that no two axes share.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EPS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")


def make_stock(config: Any) -> Any:
    """A model of this config with weights (and norms) that all matter, in evaluation mode."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name and name.endswith("weight") else 0, 0.15)
    return model


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    fields: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    keys: dict[str, Any] | None = None,
    name: str = "tiny",
    quantized: str | None = None,
) -> Path:
    """Write `model`; `fields` of the architecture and whole `keys` on top, `drop` is left out.

    quantized: a type of ggml for the tensors of more than one dim whose rows are whole blocks.
    """
    config = model.config
    heads, size = config.num_attention_heads, head_size(config)
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "vocab_size": VOCAB,
    }
    if hasattr(config, "rms_norm_eps"):
        said["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    for attribute in _EPS:
        if hasattr(config, attribute):
            said["attention.layer_norm_epsilon"] = getattr(config, attribute)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        rope = rope.get("full_attention", rope)
        said["rope.freq_base"] = float(rope["rope_theta"])
        said["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
    said |= fields or {}
    writer = gguf.GGUFWriter(path, architecture)
    if architecture:
        writer.add_name(name)
    for key, value in said.items():
        if key not in drop:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (keys or {}).items():
        _add(writer, key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*symbols_of_tokens(), "<end>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    for key, tensor in (gguf_tensors(model, architecture) | (tensors or {})).items():
        if key in drop:
            continue
        kind = None if quantized is None else gguf.GGMLQuantizationType[quantized]
        if kind and tensor.ndim > 1 and not tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(key, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The weights by their GGUF names, laid out as GGUF has them."""
    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    written = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = weight.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = np.split(tensor, 2, axis=1)
            written[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            written[f"blk.{layer}.ffn_up_exps.weight"] = up
            continue
        stem, _, last = name.rpartition(".")
        stem, last = (stem, last) if last in ("weight", "bias") else (name, "weight")
        key = f"{names.get_name(stem)}.{last}"
        if architecture == "llama" and ".attn_q." in key:
            tensor = interleaved(tensor, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in key:
            tensor = interleaved(tensor, config.num_key_value_heads)
        if architecture in ("gemma2", "gemma3") and key.endswith("norm.weight"):
            tensor = tensor + 1
        written[key] = tensor
    return written


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in the order of pairs that are neighbours, as llama.cpp rotates."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def head_size(config: Any) -> int:
    """D of a config."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    kinds[type(value)](key, value)
