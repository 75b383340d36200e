"""Whether a decoder layer computes what its family's file says: asked at attach, by trying it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.layers.forward import LayerForward, obstacle
from headwise.hf.layers.parts import LayerParts
from headwise.hf.module_hook import ATTACHED
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.ops import layer_offer
from headwise.spec.config.decoder_layer import DecoderLayer

# Of the largest number that a layer adds: as for logits in float32, or some roundings of the dtype.
_FLOAT32, _ROUNDINGS = 1e-4, 8
# Tokens in the cache, unless a window reaches further.
_CACHED = 5
_LONGEST = 8192
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def trial(layers: dict[str, nn.Module], form: DecoderLayer) -> dict[str, str | None]:
    """Of each layer why it stays with Transformers; None where it does what the form says.

    Layers that differ in their numbers alone are tried once. Nothing of them is changed, no hook
    of theirs runs, and PyTorch's generator is not touched.
    """
    known: dict[Any, str | None] = {}
    reasons: dict[str, str | None] = {}
    for name, layer in layers.items():
        reason = obstacle(layer)
        if reason is None:
            try:
                parts = LayerParts(layer, form)
            except _FAULTS as error:
                reasons[name] = f"it is not made as {form.name} is ({_said(error)})"
                continue
            if not parts.are_as_they_were(layer):
                reasons[name] = "its modules are not its own"
                continue
            reason, kind = parts.obstacle, _kind(parts)
            if reason is None and kind not in known:
                known[kind] = _difference(layer, form, parts)
            reason = known[kind] if reason is None else reason
        reasons[name] = reason
    return reasons


def _kind(parts: LayerParts) -> Any:
    attention = parts.attention
    scalars = {
        name: value
        for name, value in vars(attention).items()
        if isinstance(value, int | float | str | bool | None) and name != "layer_idx"
    }
    shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in parts.tensors)
    kinds = tuple(kind for *_, kind in parts.modules)
    return kinds, shapes, tuple(sorted(scalars.items(), key=repr))


def _difference(layer: nn.Module, form: DecoderLayer, parts: LayerParts) -> str | None:
    tensors = parts.tensors
    first = tensors[0]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"its weights are on {first.device.type}"
    if any(type(t) is not nn.Parameter or t.dtype != first.dtype for t in tensors):
        return "its weights are not plain parameters of one dtype"
    if nn.modules.module._has_any_global_hook():
        return "hooks for all modules are registered"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if layer_offer(torch.empty(1, 1, 1, dtype=first.dtype), tensors) is None:
                return f"no kernel runs {first.dtype} here"
            for dtype in dict.fromkeys((torch.float32, first.dtype)):
                reason = _tried(_twin(layer, form, dtype), form, dtype)
                if reason is not None:
                    return reason
    except _FAULTS as error:
        return f"it cannot be tried ({_said(error)})"
    return None


def _twin(layer: nn.Module, form: DecoderLayer, dtype: torch.dtype) -> nn.Module:
    """A copy whose attention is ours, without hooks; of one dtype."""
    twin = copy.deepcopy(layer).to(dtype).eval()
    for module in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            module.__dict__[hooks].clear()
    attention: Any = twin._modules[form.attention]
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = ATTACHED
    attention.layer_idx = 0
    return twin


@dataclass(frozen=True)
class _Call:
    batch: int
    rows: int
    cached: int
    padded: bool


def _calls(window: int | None) -> Iterator[_Call]:
    yield _Call(1, 1, _CACHED, False)
    yield _Call(2, 3, _CACHED, True)
    if window is not None and window < _LONGEST:
        yield _Call(1, 2, window + 3, False)


def _tried(twin: nn.Module, form: DecoderLayer, dtype: torch.dtype) -> str | None:
    """How ours differs from the layer's own in what attention or MLP adds; None if it does not."""
    ours, generator = LayerForward(twin, form), torch.Generator("cpu").manual_seed(0)
    parts = ours.parts
    sources = (parts.attention, parts.attention.config)
    window = next(filter(None, (getattr(of, "sliding_window", None) for of in sources)), None)
    # each alone, lest the larger one hides the other, and one after the other
    for what, other in (
        ("its attention", parts.mlp[-1]),
        ("its MLP", parts.out),
        ("it", None),
    ):
        kept = {} if other is None else {k: v.clone() for k, v in other.state_dict().items()}
        for parameter in () if other is None else other.parameters():
            parameter.zero_()
        for call in _calls(window):
            x, given = _arguments(call, parts, generator, dtype)
            # a cache of its own for each
            expected = type(twin).forward(twin, x, **copy.deepcopy(given))
            offer = ours._offer(twin, (x,), given)
            if offer is None:
                return "its calls are not those that the operators take"
            if not isinstance(expected, Tensor):
                return f"it returns a {type(expected).__name__}"
            reason = _compared(x, expected, ours._run(offer, x, given))
            if reason is not None:
                return f"what {what} adds in {str(dtype).removeprefix('torch.')} {reason}"
        if other is not None:
            other.load_state_dict(kept)
    return None


def _compared(x: Tensor, expected: Tensor, given: Tensor) -> str | None:
    added = (expected.double() - x.double()).abs().max()
    eps = torch.finfo(x.dtype).eps
    bound = max(_FLOAT32, _ROUNDINGS * eps) * added + 4 * eps * expected.double().abs().max()
    error = (given.double() - expected.double()).abs().max()
    if not error <= bound:
        return f"differs by {float(error / added):.0e} of the largest"
    return None


def _arguments(
    call: _Call, parts: LayerParts, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x = random(call.batch, call.rows, parts.out.out_features)
    cache = DynamicCache()
    held = (call.batch, parts.kv_heads, call.cached, parts.dim)
    # scores of a size that a cap changes; the rounding of a lower dtype would change their weights
    size = 4.0 if dtype == torch.float32 else 1.0
    cache.update(size * random(*held), random(*held), 0)
    # angles as of positions far beyond any context
    half = _rotated(parts) // 2
    angles = 1e3 * torch.randn(call.batch, call.rows, half, generator=generator)
    angles = torch.cat([angles, angles], dim=-1)
    given: dict[str, Any] = {
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        CACHE: cache,
    }
    if call.padded:
        total = call.cached + call.rows
        mask = torch.ones(call.rows, total, dtype=torch.bool).tril(call.cached)
        mask = mask.repeat(call.batch, 1, 1, 1)
        mask[-1, ..., :2] = False
        given["attention_mask"] = mask
    return x, given


def _rotated(parts: LayerParts) -> int:
    """The dims of a head that the model's rotary embedding gives angles for."""
    config = parts.attention.config
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return int(parts.dim * (1.0 if factor is None else factor))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
