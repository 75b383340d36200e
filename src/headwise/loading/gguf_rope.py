"""The rotation of a GGUF's model: the config is told of it, and the model made is compared with it.

The file says a base, a number of dims, a scaling (linear, yarn), or a tensor of divisors, one per
frequency: `rope_freqs` (Llama 3.1's scaling, worked out by the converter) or the two of Phi-3's
LongRoPE. Transformers' reader takes the base alone.
"""

import math
from typing import Any

import torch

from headwise.errors import LoadError
from headwise.loading.gguf_file import GgufFile

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SCALING = (
    "attn_factor",
    "factor",
    "finetuned",  # whether the model was tuned for it, which changes no number
    "original_context_length",
    "type",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_ext_factor",
)
_ATTENTION = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
ROPE_FIELDS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    *(f"rope.scaling.{name}" for name in _SCALING),
}

# Classes that rotate a part of a head; the others would rotate it whole or fail.
_PARTIAL = {"phi3", "stablelm", "nemotron"}
# Llama 3.1's own constants, which its converter puts into the divisors: the longest wave that is
# left as it is fits 4 times into the original context, the shortest that is divided whole, once.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def set_rope(gguf: GgufFile, said: dict[str, Any]) -> None:
    """Put the file's rotation into the config `said`, a dictionary, as its `rope_parameters`.

    Raises:
        LoadError: a scaling that is not known, or that Transformers' class cannot do.
    """
    kind, scaling = said["model_type"], _scaling(gguf)
    if kind in ("gemma4_text", "bloom", "gpt2", "mamba") or "rope_parameters" in said:
        # Nothing to set: the class has no rotation, or its config states one; check_rope compares.
        if scaling["rope_type"] != "default":
            _refuse(gguf, f"a rope scaling of type {scaling['rope_type']}")
        return
    said.pop("rope_scaling", None)
    base = gguf.get("rope.freq_base", said.pop("rope_theta", None))
    if base is None and scaling["rope_type"] != "default":
        base = 10_000.0  # llama.cpp's where the file says none; else the class's stands
    rope = scaling | ({} if base is None else {"rope_theta": float(base)})
    if kind in _PARTIAL:
        dims, size = gguf.get("rope.dimension_count"), _head_size(gguf)
        if dims and size:
            said["partial_rotary_factor"] = rope["partial_rotary_factor"] = dims / size
    if kind == "gemma3_text":
        local = {
            "rope_type": "default",
            "rope_theta": float(gguf.get("rope.freq_base_swa", 10_000.0)),
        }
        rope.setdefault("rope_theta", 1_000_000.0)
        said["rope_parameters"] = {"sliding_attention": local, "full_attention": rope}
        return
    if kind == "phi3" and "original_max_position_embeddings" in rope:
        said["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    said["rope_parameters"] = rope


def check_rope(gguf: GgufFile, model: Any) -> None:
    """Compare the frequencies that `model` turns with, on the CPU, with those that the file says.

    Raises:
        LoadError: they differ: the model's class does not do what the file asks for.
    """
    turns = {
        name: buffer.float()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and "long_inv" not in name
    }
    if not turns:
        if gguf.get("rope.scaling.type", "none") != "none" or _held(gguf):
            _refuse(gguf, "a rope scaling")
        return
    base = gguf.get("rope.freq_base")
    for name, found in turns.items():
        local = "sliding" in name
        if local:
            dims = gguf.get("rope.dimension_count_swa") or gguf.get("attention.key_length_swa")
        else:
            dims = gguf.get("rope.dimension_count")
        dims = dims or _head_size(gguf)
        if dims != 2 * len(found):
            _refuse(gguf, f"a rotation of {dims} dims, not {2 * len(found)}")
        if local:
            right = _plain(gguf.get("rope.freq_base_swa", 10_000.0), dims)
        elif base is None:
            continue  # the class's own, which the file does not contradict
        else:
            right = _frequencies(gguf, float(base), dims)
        if not torch.allclose(found, right, rtol=1e-4, atol=1e-20):
            _refuse(gguf, f"frequencies of a rotation ({name}) that are not those of its class")


def _scaling(gguf: GgufFile) -> dict[str, Any]:
    """The `rope_parameters` of the file's scaling, without the base."""
    kind = gguf.get("rope.scaling.type")
    factor = gguf.get("rope.scaling.factor", gguf.get("rope.scale_linear"))
    original = gguf.get("rope.scaling.original_context_length")
    held = _held(gguf)
    if kind is None:  # llama.cpp takes a factor without a type as linear, and so do its old files
        kind = "linear" if factor else "none"
    if kind == "linear" and factor in (None, 0, 1):
        kind = "none"
    factors = [f"rope.scaling.{name}" for name in _ATTENTION]
    own = [name for name in factors if gguf.get(name, 1.0) != 1.0]
    if own and (
        kind not in ("none", "longrope") or own != ["rope.scaling.attn_factor"] or not held
    ):
        # What the attention factors multiply changed between versions of llama.cpp.
        _refuse(gguf, f"{own[0]} {gguf.get(own[0])!r} with rope.scaling.type {kind!r}")
    if {"rope_factors_long.weight", "rope_factors_short.weight"} <= set(held) and kind in (
        "none",
        "longrope",
    ):
        rope = {
            "rope_type": "longrope",
            "short_factor": held["rope_factors_short.weight"].tolist(),
            "long_factor": held["rope_factors_long.weight"].tolist(),
            "original_max_position_embeddings": original or gguf.get("context_length"),
        }
        attention = gguf.get("rope.scaling.attn_factor")
        return rope | ({"attention_factor": float(attention)} if attention else {})
    if set(held) == {"rope_freqs.weight"} and kind == "none" and not own:
        return _divided(gguf, held["rope_freqs.weight"])
    if held or kind not in ("none", "linear", "yarn"):
        _refuse(gguf, f"rope.scaling.type {kind!r} with {' and '.join(held) or 'no factors'}")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if not factor:
        _refuse(gguf, "a yarn scaling without a factor")
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": original or gguf.get("context_length"),
        "beta_fast": float(gguf.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(gguf.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _divided(gguf: GgufFile, divisors: torch.Tensor) -> dict[str, Any]:
    """Frequencies divided one by one: as Llama 3.1 does where that gives them, else as they are."""
    if bool((divisors == 1).all()):
        return {"rope_type": "default"}
    base = gguf.get("rope.freq_base", 10_000.0)
    waves = 2 * math.pi / _plain(base, 2 * len(divisors)).double()
    factor = float(divisors.max())
    kept = (factor / divisors.double() - 1) / (factor - 1) if factor > 1 else torch.ones(1)
    middle = (kept > 1e-3) & (kept < 1 - 1e-3)
    original = gguf.get("rope.scaling.original_context_length", _ORIGINAL)
    if bool(middle.any()):  # kept = (original / wave - low) / (high - low)
        original = round(float((waves * (kept * (_HIGH - _LOW) + _LOW))[middle].mean()))
    smooth = ((original / waves - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    if torch.allclose(1 / ((1 - smooth) / factor + smooth), divisors.double(), rtol=1e-3):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
    # LongRoPE with one list for short and long contexts is any list of divisors.
    return {
        "rope_type": "longrope",
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": gguf.get("context_length"),
        "attention_factor": 1.0,
    }


def _frequencies(gguf: GgufFile, base: float, dims: int) -> torch.Tensor:
    """[P/2] radians per position, by llama.cpp's formulas."""
    plain, held = _plain(base, dims), _held(gguf)
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in held:
            if held[name].shape != plain.shape:
                _refuse(gguf, f"{len(held[name])} divisors ({name}) of {len(plain)} frequencies")
            return plain / held[name]
    scaling = _scaling(gguf)
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        original = scaling["original_max_position_embeddings"]

        def turned(rotations: float) -> float:
            """The pair whose wave turns so often within the original context."""
            return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(turned(scaling["beta_fast"])), 0)
        high = min(math.ceil(turned(scaling["beta_slow"])), dims - 1)
        ramp = ((torch.arange(dims // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - ramp) + plain / scaling["factor"] * ramp
    return plain


def _plain(base: float, dims: int) -> torch.Tensor:
    return torch.tensor([base ** (-pair / dims) for pair in range(0, dims, 2)])


def _head_size(gguf: GgufFile) -> int:
    heads, width = gguf.get("attention.head_count"), gguf.get("embedding_length")
    return int(gguf.get("attention.key_length") or width // heads)


def _held(gguf: GgufFile) -> dict[str, torch.Tensor]:
    """The tensors of divisors in the file, read."""
    from transformers.integrations.gguf import load_gguf_state_dict

    names = [name for name in ROPE_TENSORS if name in gguf.tensors]
    if not names:
        return {}
    tensors = load_gguf_state_dict(gguf.header)
    read = {name: tensors[name][...].flatten() for name in names}
    for name, divisors in read.items():
        if not divisors.is_floating_point() or not bool((divisors > 0).all()):
            raise LoadError(f"{gguf.path}: {name} is not a list of divisors above 0")
    return {name: divisors.float() for name, divisors in read.items()}


def _refuse(gguf: GgufFile, what: str) -> None:
    raise LoadError(
        f"{gguf.path} asks for {what}, which cannot be handed to Transformers: the model would "
        "compute something else; give the original model's folder"
    )
