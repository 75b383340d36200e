"""Which model it is that fills a cache: a hash over every tensor that runs, kept until one changes.

What it does not see are writes that go round PyTorch's version counters, as `weight.data[0] = 1`
does: `headwise.detach` and `attach` look again.
"""

import ctypes
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from headwise.errors import UnsupportedError
from headwise.hf.module_hook import ModuleHook
from headwise.stored.origin import Origin

# Of a config or a module: what does not change what a cache holds.
_NO_MATTER = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "architectures", "use_cache"),
        *("torch_dtype", "dtype", "output_hidden_states", "output_attentions", "return_dict"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "training", "gradient_checkpointing"),
        *("_is_hf_initialized", "_is_full_backward_hook", "warnings_issued", "loss_type"),
        *("_load_state_dict_post_hooks", "_attn_implementation_internal", "kernel_config"),
        # of rotations: the longest text so far
        *("max_seq_len_cached", "longest_seq_len_cached", "long_inv_freq", "short_inv_freq"),
    }
)
_SIMPLE = (int, float, str, bool, type(None))
_KNOWN = ("torch.", "transformers.", "headwise.")
# Whose hooks change no value: Transformers' capture outputs, accelerate's move tensors.
_HOOKS = ("headwise.", "transformers.utils.output_capturing", "accelerate.")
_LIBRARIES = tuple(
    os.path.dirname(found.origin) + os.sep
    for name in ("torch", "transformers", "headwise", "peft")
    if (found := find_spec(name)) is not None and found.origin is not None
)
_COMPILED = "was traced or scripted, and what it does is not known"
_SAMPLE = 16  # bytes of a tensor, or more, that are looked at

# Where each tensor is and how often it was written; what modules of others are set to.
Stamp = tuple[Any, ...]


@dataclass
class Identity:
    """The hashes of a model, and its stamp when they were taken."""

    stamp: Stamp
    config: str
    weights: str


def origin_of(model: Any, kind: str) -> Origin:
    """What is in a cache of this kind that an attached model fills now.

    Raises:
        UnsupportedError: weights that are not in memory.
    """
    identity = _identity(model)
    config = model.config.get_text_config(decoder=True).to_dict()
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return Origin(
        model=type(model).__name__,
        dtype=_dtype_of(model),
        cache=kind,
        rope=json.dumps(rope, sort_keys=True, default=str),
        config=identity.config,
        weights=identity.weights,
    )


def stamp_of(model: Any) -> Stamp:
    """What changes when somebody writes to a weight, replaces one, or switches an adapter."""
    stamp: list[Any] = [_dtype_of(model)]
    for module in _modules(model):
        kind, volatile, why = type(module), _of_length(module), _touched(module)
        stamp += [kind, why]
        if why == _COMPILED:
            continue
        for tensors in (module._parameters, module._buffers):
            stamp += [
                _stamp_of_tensor(each)
                for name, each in tensors.items()
                if each is not None and name not in volatile
            ]
        if not kind.__module__.startswith(_KNOWN):
            stamp.append(_settings(module))
    return tuple(stamp)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, as `model.modules()` has them, which takes ten times as long."""
    pending, seen = [model], set[int]()
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            if isinstance(module, torch.jit.ScriptModule):
                continue
            pending += [each for each in module._modules.values() if each is not None]


def _stamp_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Where it is, how often it was written, and its first bytes: memory is used again."""
    at, version = tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
    if not at or not tensor.is_cpu or tensor.numel() < _SAMPLE or not tensor.is_contiguous():
        return at, version
    return at, version, ctypes.string_at(at, _SAMPLE)


def touched(model: nn.Module) -> str | None:
    """What of a model is not the code of Transformers, PyTorch or PEFT alone; None if nothing is.

    Hooks, forwards that were replaced and modules of somebody's own may do anything, and what a
    cache holds depends on them.
    """
    for module in _modules(model):
        why = _touched(module)
        if why is not None:
            name = next(name for name, each in model.named_modules() if each is module)
            return f"{name or 'the model'}, a {type(module).__name__}, {why}"
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    configs = getattr(getattr(prepare, "__self__", None), "peft_config", None) or {}
    for config in configs.values():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            return f"a {type(config).__name__} of PEFT depends on where a prompt begins"
    return None


def _touched(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return _COMPILED
    own = module.__dict__
    for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
        for hook in hooks.values():
            if not getattr(hook, "__module__", "").startswith(_HOOKS):
                return "has hooks"
    forward = own.get("forward")
    if forward is not None and not isinstance(forward, ModuleHook) and "_hf_hook" not in own:
        return "has another forward than its class"
    kind: Any = type(module)
    return _foreign(kind, kind.forward)


@cache
def _foreign(kind: Any, forward: Any) -> str | None:
    """What of a class or its forward was not written in one of the libraries."""
    if kind.__module__.startswith("torch.ao."):
        return "may round by all tokens of a call"
    if not kind.__module__.startswith((*_KNOWN, "peft.")):
        return f"is a module of {kind.__module__}, and what it does is not known"
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is not None and not code.co_filename.startswith(_LIBRARIES):
        return "has a class whose forward was replaced"
    return None


def _dtype_of(model: Any) -> str:
    """What it computes in."""
    dtype = str(model.dtype).removeprefix("torch.")
    kind = model.device.type
    if not torch.is_autocast_enabled(kind):
        return dtype
    return f"{dtype}, autocast to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"


def _identity(model: Any) -> Identity:
    """Of an attached model; hashed again where its stamp is another."""
    attachment, stamp = model._headwise, stamp_of(model)
    if attachment.identity is None or attachment.identity.stamp != stamp:
        attachment.identity = Identity(stamp, _hash_config(model), _hash_weights(model))
    identity: Identity = attachment.identity
    return identity


def _hash_weights(model: nn.Module) -> str:
    hashed, known = xxhash.xxh3_128(), dict[int, str]()
    for name, tensor in _tensors(model):
        if tensor.device.type == "meta":
            raise UnsupportedError(
                f"{name} of {type(model).__name__} is not in memory, so that what its cache is of "
                "cannot be told: load the whole model"
            )
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        if id(tensor) in known:  # one tensor under two names
            hashed.update(f"{head} as {known[id(tensor)]}".encode())
            continue
        known[id(tensor)] = name
        hashed.update(head.encode())
        if tensor.numel():
            plain = tensor.detach().cpu().contiguous()
            hashed.update(plain.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and name not in _of_length(module):
                    yield f"{prefix}.{name}", tensor


def _of_length(module: nn.Module) -> frozenset[str]:
    """The buffers that a rotation writes when a text gets longer; the first ones stay beside it."""
    kinds = module.__dict__.get("rope_type")
    if kinds is None:
        return frozenset()
    names = {n for n in module._buffers if n.endswith("inv_freq") and not n.startswith("original")}
    every = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    changes = any("dynamic" in str(kind) or kind == "longrope" for kind in every)
    return frozenset(names) if changes else frozenset()


def _hash_config(model: Any) -> str:
    """Of what configs and modules say, the classes among it."""
    said: list[Any] = [_plain(model.config.get_text_config(decoder=True).to_dict())]
    for name, module in model.named_modules():
        said.append((name, type(module).__qualname__, _settings(module)))
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True, default=str).encode())


def _settings(module: nn.Module) -> str:
    """What a module is set to: numbers, names, and lists or tables of them."""
    said = {}
    for name, value in module.__dict__.items():
        if name in _NO_MATTER or name.startswith("_headwise") or "hooks" in name:
            continue
        plain = _plain(value) if isinstance(value, (*_SIMPLE, list, tuple, dict)) else None
        if plain is not None and name not in ("_parameters", "_buffers", "_modules"):
            said[name] = plain
    return json.dumps(said, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Numbers, names and what is made of them; of other objects nothing."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _NO_MATTER}
    return None
