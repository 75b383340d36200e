"""Whether a decoder layer computes what its family's file says: asked at attach, by trying it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import ATTACHED
from headwise.hf.packed import PackedLinear
from headwise.hf.step.compared import PACKED_EPS
from headwise.hf.step.layers.forward import LayerForward, obstacle, run
from headwise.hf.step.layers.parts import LayerParts, angles_of
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.ops import layer_offer
from headwise.spec.config.decoder_layer import DecoderLayer

# Of the largest number that a layer adds: as for logits in float32, or some roundings of the dtype.
_FLOAT32, _ROUNDINGS = 1e-4, 8
# Tokens in the cache, unless a window reaches further.
_CACHED = 5
_LONGEST = 8192


def trial(layers: dict[str, nn.Module], form: DecoderLayer) -> dict[str, str | None]:
    """Of each layer why it stays with Transformers; None where it does what the form says.

    Layers that differ in their numbers alone are tried once. Nothing of them is changed, no hook
    of theirs runs, and PyTorch's generator is not touched.
    """
    known: dict[Any, str | None] = {}
    reasons: dict[str, str | None] = {}
    for name, layer in layers.items():
        try:
            reasons[name] = obstacle(layer) or _difference(layer, form, known)
        except Exception as error:  # noqa: BLE001 - of modules of any kind, and of copying them
            fault = str(error).partition("\n")[0]
            reasons[name] = f"it cannot be tried ({type(error).__name__}: {fault})"
    return reasons


def _difference(layer: nn.Module, form: DecoderLayer, known: dict[Any, str | None]) -> str | None:
    parts = LayerParts(layer, form)
    # what an MLP of its own has is its own affair
    own = () if parts.own_mlp is None else parts.own_mlp.parameters()
    others = set(map(id, own))
    tensors = [tensor for tensor in layer.parameters() if id(tensor) not in others]
    reason = parts.obstacle()
    if reason is not None:
        return reason
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"its weights are on {tensors[0].device.type}"
    if any(type(t) is not nn.Parameter or t.dtype != tensors[0].dtype for t in tensors):
        return "its weights are not plain parameters of one dtype"
    if nn.modules.module._has_any_global_hook():
        return "hooks for all modules are registered"
    kind = _kind(parts, layer)
    if kind not in known:
        known[kind] = _tried_in_all(layer, form, tensors)
    return known[kind]


def _kind(parts: LayerParts, layer: nn.Module) -> Any:
    """What layers have in common that differ in their weights alone."""
    scalars = {
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | bool | None)
        and key not in ("layer_idx", "training")
    }
    tensors = (*layer.parameters(), *layer.buffers())
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    kinds = (type(layer), *(kind for *_, kind in parts.modules))
    return kinds, shapes, frozenset(scalars)


def _tried_in_all(layer: nn.Module, form: DecoderLayer, tensors: list[Any]) -> str | None:
    own = tensors[0].dtype
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if layer_offer(torch.empty(1, 1, 1, dtype=own), tensors) is None:
            return f"no kernel runs {own} here"
        for dtype in dict.fromkeys((torch.float32, own)):
            reason = _tried(_twin(layer, form, dtype), form, dtype)
            if reason is not None:
                return reason
    return None


def _twin(layer: nn.Module, form: DecoderLayer, dtype: torch.dtype) -> nn.Module:
    """A copy whose attention is ours, without hooks; of one dtype."""
    parts, memo = LayerParts(layer, form), dict[int, Any]()
    if parts.own_mlp is not None:  # nothing is claimed of it, and experts are large
        memo[id(parts.own_mlp)] = _StandIn(parts.out.out_features, form.routes)
    twin = copy.deepcopy(layer, memo).to(dtype).eval()
    generator = torch.Generator("cpu").manual_seed(1)
    for parameter in twin.parameters():
        if not parameter.any():  # what is multiplied by zeros says nothing
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            module.__dict__[hooks].clear()
    attention: Any = twin._modules[form.attention]
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = ATTACHED
    attention.layer_idx = 0
    return twin


class _StandIn(nn.Module):
    """An MLP for a trial, in place of one that runs as the module that it is."""

    def __init__(self, width: int, routes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.routes = routes

    def forward(self, x: Tensor) -> Any:
        added = x.roll(1, dims=-1) * self.weight
        return (added, x) if self.routes else added


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
    parts = LayerParts(twin, form)
    sources = (parts.attention, parts.attention.config)
    packed = any(isinstance(module, PackedLinear) for module in twin.modules())
    window = next(filter(None, (getattr(of, "sliding_window", None) for of in sources)), None)
    # each alone, lest the larger one hides the other, and one after the other
    for what, other in (
        ("its attention", parts.own_mlp if parts.mlp == [] else parts.mlp[-1]),
        ("its MLP", parts.out),
        ("it", None),
    ):
        # buffers hold packed weights
        numbers = [] if other is None else [*other.parameters(), *other.buffers()]
        kept = [tensor.clone() for tensor in numbers]
        for tensor in numbers:
            tensor.zero_()
        for call in _calls(window):
            x, given = _arguments(call, parts, generator, dtype)
            # a cache of its own for each
            expected = type(twin).forward(twin, x, **copy.deepcopy(given))
            plan = ours.plan(twin, (x,), given)
            if plan is None:
                return "its calls are not those that the operators take"
            if not isinstance(expected, Tensor):
                return f"it returns a {type(expected).__name__}"
            reason = _compared(x, expected, run(*plan, x, given), packed)
            if reason is not None:
                return f"what {what} adds in {str(dtype).removeprefix('torch.')} {reason}"
        for tensor, was in zip(numbers, kept, strict=True):
            tensor.copy_(was)
    return None


def _compared(x: Tensor, expected: Tensor, given: Tensor, packed: bool) -> str | None:
    added = (expected.double() - x.double()).abs().max()
    eps = torch.finfo(x.dtype).eps
    rounding = max(eps, PACKED_EPS) if packed else eps
    bound = max(_FLOAT32, _ROUNDINGS * rounding) * added + 4 * eps * expected.double().abs().max()
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
    dim = parts.attention.head_dim
    projections: list[Any] = parts.qkv
    rows = sum(module.out_features for module in projections) // dim
    kv_heads = (rows - parts.out.in_features // dim) // 2
    held = (call.batch, kv_heads, call.cached, dim)
    # scores of a size that a cap changes; the rounding of a lower dtype would change their weights
    size = 4.0 if dtype == torch.float32 else 1.0
    cache.update(size * random(*held), random(*held), 0)
    # angles as of positions far beyond any context
    count, rotation = angles_of(parts.attention.config, dim, parts.form), parts.form.rotation
    pairs = count if rotation == "halves once" else count // 2
    angles = 1e3 * torch.randn(call.batch, call.rows, pairs, generator=generator)
    if rotation == "neighbours twice":
        angles = angles.repeat_interleave(2, dim=-1)
    elif rotation != "halves once":
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
