"""The rotation of a GGUF's model: the config is told of it, and the model made is compared with it.

The file says a base, a number of dims, a scaling (linear, yarn), or a tensor of divisors, one per
frequency: `rope_freqs` (Llama 3.1's scaling, worked out by the converter) or the two of Phi-3's
LongRoPE. Transformers' reader takes the base alone.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from headwise.errors import LoadError, OptionError, UnsupportedError
from headwise.loading.gguf.file import GgufFile
from headwise.nn import Llama3Scaling
from headwise.nn.pretrained import scaling_of

_FREQS, _LONG, _SHORT = ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_ATTENTION = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
_OTHERS = ("factor", "original_context_length", "type", "yarn_beta_fast", "yarn_beta_slow")
ROPE_FIELDS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.finetuned",  # whether the model was tuned for it, which changes no number
    *(f"rope.scaling.{name}" for name in (*_ATTENTION, *_OTHERS)),
}
# What llama.cpp takes where a file does not say a base.
_BASE = 10_000.0
# Tokens of Llama 3.1's original context, where its divisors do not tell.
_LLAMA3_CONTEXT = 8192


def set_rope(gguf: GgufFile, said: dict[str, Any], names: set[str]) -> None:
    """Put the file's rotation into the config `said`, whose class has `names`.

    Raises:
        LoadError: a scaling that is not known, or that Transformers' class cannot do.
    """
    architecture, rope = gguf.architecture, _scaling(gguf)
    stated = architecture.states_rope or "rope_parameters" in said
    if stated or "rope_parameters" not in names:
        # Nothing to set: the class has no rotation, or its config states one; check_rope compares.
        if rope["rope_type"] != "default":
            _refuse(gguf, f"a rope scaling of type {rope['rope_type']}")
        return
    said.pop("rope_scaling", None)
    base = gguf.get("rope.freq_base", said.pop("rope_theta", None))
    if base is None and rope["rope_type"] != "default":
        base = _BASE  # without a scaling the class's stands
    if base is not None:
        rope["rope_theta"] = float(base)
    if architecture.partial_rope:
        dims, size = gguf.get("rope.dimension_count"), _head_size(gguf)
        if dims and size:
            said["partial_rotary_factor"] = rope["partial_rotary_factor"] = dims / size
    if architecture.local_rope:
        local_base = float(gguf.get("rope.freq_base_swa", _BASE))
        local = {"rope_type": "default", "rope_theta": local_base}
        rope.setdefault("rope_theta", 1_000_000.0)
        said["rope_parameters"] = {"sliding_attention": local, "full_attention": rope}
        return
    original = "original_max_position_embeddings"
    if original in names and original in rope:
        said[original] = rope[original]
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
    if not turns and (gguf.get("rope.scaling.type", "none") != "none" or _divisors(gguf)):
        _refuse(gguf, "a rope scaling")
    base = gguf.get("rope.freq_base")
    for name, frequencies in turns.items():
        local = "sliding" in name
        if local:
            dims = gguf.get("rope.dimension_count_swa") or gguf.get("attention.key_length_swa")
        else:
            dims = gguf.get("rope.dimension_count")
        dims = dims or _head_size(gguf)
        if dims != 2 * len(frequencies):
            _refuse(gguf, f"a rotation of {dims} dims, not {2 * len(frequencies)}")
        if local:
            expected = _plain(gguf.get("rope.freq_base_swa", _BASE), dims)
        elif base is None:
            continue  # the class's own, which the file does not contradict
        else:
            expected = _frequencies(gguf, float(base), dims)
        if not torch.allclose(frequencies, expected, rtol=1e-4, atol=1e-20):
            _refuse(gguf, f"frequencies of a rotation ({name}) that are not those of its class")


def _scaling(gguf: GgufFile) -> dict[str, Any]:
    """The `rope_parameters` of the file's scaling, without the base."""
    kind = gguf.get("rope.scaling.type")
    factor = gguf.get("rope.scaling.factor", gguf.get("rope.scale_linear"))
    original = gguf.get("rope.scaling.original_context_length") or gguf.get("context_length")
    divisors = _divisors(gguf)
    if kind is None:  # llama.cpp takes a factor without a type as linear, and so do its old files
        kind = "linear" if factor else "none"
    if kind == "linear" and factor in (None, 0, 1):
        kind = "none"
    attention = {f"rope.scaling.{name}": gguf.get(f"rope.scaling.{name}") for name in _ATTENTION}
    scales = [name for name, value in attention.items() if value not in (None, 1.0)]
    alone = scales == ["rope.scaling.attn_factor"] and kind in ("none", "longrope")
    if scales and not (alone and divisors):
        # What the attention factors multiply changed between versions of llama.cpp.
        _refuse(gguf, f"{scales[0]} {attention[scales[0]]!r} with rope.scaling.type {kind!r}")
    if {_LONG, _SHORT} <= set(divisors) and kind in ("none", "longrope"):
        rope = _longrope(divisors[_SHORT], divisors[_LONG], original)
        strength = attention["rope.scaling.attn_factor"]
        return rope | ({"attention_factor": float(strength)} if strength else {})
    if set(divisors) == {_FREQS} and kind == "none" and not scales:
        return _divided(gguf, divisors[_FREQS])
    if divisors or kind not in ("none", "linear", "yarn"):
        _refuse(gguf, f"rope.scaling.type {kind!r} with {' and '.join(divisors) or 'no factors'}")
    if kind == "none":
        return {"rope_type": "default"}
    if not factor:
        _refuse(gguf, "a yarn scaling without a factor")
    rope = {"rope_type": kind, "factor": float(factor)}
    if kind == "linear":
        return rope
    return rope | {
        "original_max_position_embeddings": original,
        "beta_fast": float(gguf.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(gguf.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _longrope(short: Tensor, long: Tensor, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
    }


def _divided(gguf: GgufFile, divisors: Tensor) -> dict[str, Any]:
    """Frequencies divided one by one: as Llama 3.1 does where that gives them, else as they are."""
    if bool((divisors == 1).all()):
        return {"rope_type": "default"}
    base = gguf.get("rope.freq_base", _BASE)
    plain, factor = _plain(base, 2 * len(divisors)), float(divisors.max())
    original = gguf.get("rope.scaling.original_context_length") or _LLAMA3_CONTEXT
    scaling = Llama3Scaling(factor, original)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (factor / divisors.double() - 1) / (factor - 1) if factor > 1 else torch.ones(1)
    middle = (kept > 1e-3) & (kept < 1 - 1e-3)
    if bool(middle.any()):  # kept = (original / wave - low) / (high - low)
        contexts = 2 * math.pi / plain.double() * (kept * (high - low) + low)
        scaling = Llama3Scaling(factor, round(float(contexts[middle].mean())))
    if torch.allclose(plain / scaling.apply(plain, base)[0], divisors, rtol=1e-3):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": scaling.original_context,
        }
    # LongRoPE with one list for short and long contexts is any list of divisors.
    rope = _longrope(divisors, divisors, gguf.get("context_length"))
    return rope | {"attention_factor": 1.0}


def _frequencies(gguf: GgufFile, base: float, dims: int) -> Tensor:
    """[P/2] radians per position, by llama.cpp's formulas."""
    plain, divisors = _plain(base, dims), _divisors(gguf)
    for name in (_FREQS, _SHORT):
        if name in divisors:
            count = len(divisors[name])
            if count != len(plain):
                _refuse(gguf, f"{count} divisors ({name}) of {len(plain)} frequencies")
            return plain / divisors[name]
    try:
        scaling = scaling_of(_scaling(gguf), gguf.get("context_length"))
    except (OptionError, UnsupportedError) as error:
        _refuse(gguf, f"a rope scaling that cannot be: {error}")
    return plain if scaling is None else scaling.apply(plain, base)[0]


def _plain(base: float, dims: int) -> Tensor:
    return torch.tensor([base ** (-pair / dims) for pair in range(0, dims, 2)])


def _head_size(gguf: GgufFile) -> int:
    heads, width = gguf.get("attention.head_count"), gguf.get("embedding_length")
    return int(gguf.get("attention.key_length") or width // heads)


def _divisors(gguf: GgufFile) -> dict[str, Tensor]:
    """The tensors of divisors in the file, read."""
    from headwise.hf.stock_names import load_gguf_state_dict

    names = [name for name in ROPE_TENSORS if name in gguf.tensors]
    tensors = load_gguf_state_dict(gguf.header) if names else {}
    read = {name: tensors[name][...].flatten() for name in names}
    for name, divisors in read.items():
        if not divisors.is_floating_point() or not bool(
            ((divisors > 0) & divisors.isfinite()).all()
        ):
            raise LoadError(f"{gguf.path}: {name} is not a list of divisors above 0")
    return {name: divisors.float() for name, divisors in read.items()}


def _refuse(gguf: GgufFile, what: str) -> NoReturn:
    gguf.refuse(f"asks for {what}, which cannot be handed to Transformers")
