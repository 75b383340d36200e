"""How far what a kernel gives is from what a module gives, for trials at `attach`."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import has_hooks

# Of a row's largest number, and of its root mean square: as for logits in float32, or roundings.
_FLOAT32, _ROUNDINGS, _MEAN_ROUNDINGS = 1e-4, 8, 1
# What rows are rounded to before packed weights.
PACKED_EPS = 2**-8
# Of the rows that are tried: a limit or an epsilon shows at one of them.
_SIZES = (1.0, 1e-2, 1e2)

# Says how ours differs from what a module gives.
Trial = Callable[[Any], str | None]


def trial_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Rows [3,width] of different sizes and a mean, from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(len(_SIZES), width, generator=generator) + 0.5
    return (rows * torch.tensor(_SIZES)[:, None]).to(dtype)


def difference(given: Tensor, expected: Tensor, packed: bool = False) -> str | None:
    """How a result [R,E] differs from what a module gave; None if it does not.

    packed: weights are, before which rows are rounded to integers: the last bit may change one.
    """
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return f"what it gives is {expected.dtype} {tuple(expected.shape)}"
    if not expected.any():
        return "it cannot be tried: it gives zeros"
    exact, error = expected.double(), (given.double() - expected.double()).abs()
    eps = max(torch.finfo(expected.dtype).eps, PACKED_EPS if packed else 0.0)
    near = error.amax(-1) <= max(_FLOAT32, _ROUNDINGS * eps) * exact.abs().amax(-1)
    mean = max(_FLOAT32, _MEAN_ROUNDINGS * eps) * exact.square().mean(-1).sqrt()
    if not (near & (error.square().mean(-1).sqrt() <= mean)).all():
        share = (error.amax(-1) / exact.abs().amax(-1)).max()
        return f"what it gives differs by {float(share):.0e} of the largest"
    return None


def tried(
    module: nn.Module, kind: Hashable, known: dict[Hashable, str | None], trial: Trial
) -> str | None:
    """Why a module stays with Transformers; None if not. One of each kind is tried, and known."""
    reason = _obstacle(module)
    if reason is None and kind not in known:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                known[kind] = trial(module)
        except Exception as error:  # noqa: BLE001 - of modules of any kind
            fault = str(error).partition("\n")[0]
            known[kind] = f"it cannot be tried ({type(error).__name__}: {fault})"
    return reason or known[kind]


def _obstacle(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if nn.modules.module._has_any_global_hook():
        return "hooks for all modules are registered"
    hooked = [name for name, part in module.named_modules() if name and has_hooks(part)]
    if hooked:
        return f"its {hooked[0]} has hooks"
    weight = next(iter(module.parameters()), None)
    if weight is not None and any(each.device.type != "cpu" for each in module.parameters()):
        return f"its weights are on {weight.device.type}"
    return None
