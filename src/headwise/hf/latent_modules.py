"""Which modules of a model are MLA that can be absorbed: found by asking each what it does."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import ModuleHook

# Float32's rounding, in case a module casts; what is laid out otherwise differs by whole units.
_TOLERANCE = 1e-4
_TOKENS = 3
# What a module raises that does more with its weights or its latents than it is given here.
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def latent_modules(model: nn.Module, stay: Collection[str]) -> dict[str, str | None]:
    """The modules that expand cached latents, by name, and why each does so at every step.

    None where its latents can be absorbed. A module whose `expand_kv` somebody has replaced, and
    those of `stay`, are not among them.
    """
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        expands = hasattr(type(module), "expand_kv") and hasattr(module, "kv_b_proj")
        if expands and "expand_kv" not in module.__dict__ and name not in stay:
            found[name] = obstacle(module) or _difference(module)
    return found


def obstacle(module: Any) -> str | None:
    """Why w_uk and w_uv cannot be read off the module's up-projection; None if they can."""
    projection = module.kv_b_proj
    if type(projection) is not nn.Linear or type(projection.weight) is not nn.Parameter:
        kind = type(projection)
        return f"kv_b_proj is a {kind.__module__}.{kind.__name__}, with its own way to multiply"
    if projection.bias is not None:
        return "kv_b_proj has a bias"
    forward = projection.__dict__.get("forward")  # ours gives what the class's own gives
    foreign = forward is not None and not isinstance(forward, ModuleHook)
    replaced = foreign or projection.weight.device.type == "meta"
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    if replaced or hooks or nn.modules.module._has_any_global_hook():
        return "kv_b_proj has hooks"
    return None


class _Projection:
    """Stands in for kv_b_proj: random, float64, and of a low rank, so that its size costs nothing.

    The module's own weights may be zeros, with which any expansion would look right.
    """

    bias = None

    def __init__(self, rows: int, rank: int, generator: torch.Generator) -> None:
        self.down, self.up = _random(generator, rank, 4), _random(generator, 4, rows)

    @property
    def weight(self) -> Tensor:
        return (self.down @ self.up).T

    def __call__(self, latent: Tensor) -> Tensor:
        return latent @ self.down @ self.up


def _difference(module: Any) -> str | None:
    """How its attention, or its expansion, differs from that of w_uk and w_uv; None if it does not.

    Its `expand_kv` runs on a copy of the module, with numbers where its weights are: what it does
    with them is what counts. No hook of a module runs.
    """
    rope_dim = getattr(module, "qk_rope_head_dim", None)
    if not isinstance(rope_dim, int):
        return "it does not say how many dims are rotated (qk_rope_head_dim)"
    rows, rank = module.kv_b_proj.weight.shape
    generator = torch.Generator("cpu").manual_seed(0)
    latent = _random(generator, 1, 1, _TOKENS, rank)
    key_rope = _random(generator, 1, 1, _TOKENS, rope_dim)
    twin, projection = copy.copy(module), _Projection(rows, rank, generator)
    # without any other weight, which might change nothing today
    twin.__dict__.update(kv_b_proj=projection, _parameters={}, _buffers={}, _modules={})
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            key, value = type(module).expand_kv(twin, latent, key_rope)
            expected = _expected(projection(latent), key_rope, key, value)
    except _FAULTS as error:
        fault = str(error).partition("\n")[0]
        return f"its expand_kv cannot be tried ({type(error).__name__}: {fault})"
    if any(
        given.shape != wanted.shape
        or not bool((given - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
        for given, wanted in zip((key, value), expected, strict=True)
    ):
        return "its expand_kv gives other keys and values than the weights of kv_b_proj"
    return None


def _expected(expanded: Tensor, key_rope: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Keys [w_uk latent | rope key] and values w_uv latent, in as many heads as were given.

    Where these cannot be of such sizes, tensors of other shapes.
    """
    heads, value_dim = key.shape[1], value.shape[-1]
    per_head = expanded.view(1, _TOKENS, heads, -1).transpose(1, 2)
    key_rope = key_rope.expand(1, heads, _TOKENS, -1)
    nope_dim = per_head.shape[-1] - value_dim
    return torch.cat([per_head[..., :nope_dim], key_rope], dim=-1), per_head[..., nope_dim:]


def _random(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
