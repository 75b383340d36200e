"""Mixtures of experts: what stands in for the `forward` of a module that holds all their weights.

Transformers keeps them stacked, and its experts interface (`integrations/moe.py`) says how such a
module computes: it multiplies each row by the experts chosen for it. Stock gathers those weights,
or multiplies by all experts in turn; ours are read where they lie.
"""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import ClassHook
from headwise.hf.step.compared import difference, trial_rows, tried
from headwise.hf.step.replaced import Replaced
from headwise.hf.stock_names import ALL_EXPERTS_FUNCTIONS
from headwise.ops import faster, needs_gradients

# What the interface says of a module, beside its weights.
_FLAGS = ("has_gate", "has_bias", "is_transposed")
_HOME = ALL_EXPERTS_FUNCTIONS.__module__
# Transformers' own ways of computing the same.
_STOCK = (None, "eager", "batched_mm", "grouped_mm")


class ExpertsForward(ClassHook):
    """Stands in for the `forward` of experts on the interface; the class's own for many rows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.owner
        if self.is_same(module) and len(args) == 3 and not kwargs and _is_stock(module):
            result = _run(module, *args)
            if result is not None:
                return result
        return type(module).forward(module, *args, **kwargs)


def _is_stock(module: Any) -> bool:
    """Whether Transformers' own functions would compute this call, for all experts."""
    asked = getattr(module.config, "_experts_implementation", None)
    if asked not in _STOCK or getattr(module, "_is_expert_parallel", False):
        return False
    function = None if asked in (None, "eager") else ALL_EXPERTS_FUNCTIONS.get(asked, None)
    return getattr(function, "__module__", _HOME) == _HOME


def _run(module: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor | None:
    """What the experts give for x [T,E], of chosen and shares [T,k]; None where it is stock's."""
    into = _weight(module, "gate_up_proj" if module.has_gate else "up_proj")
    back = _weight(module, "down_proj")
    tensors = [each for each in (*into, *back) if each is not None]
    run = faster("experts", x, chosen, *into)
    # all of it is asked before any of it runs
    if run is None or shares.shape != chosen.shape or needs_gradients(shares, *tensors):
        return None
    fit = len(tensors) == (4 if module.has_bias else 2) and back[0].dtype == x.dtype
    if not fit or {len(into[0]), len(back[0])} != {module.num_experts}:
        return None
    middle = run(x, chosen, *into).flatten(0, 1)
    middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
    run = faster("experts", middle, chosen, *back)
    if run is None:
        return None
    out: Tensor = run(middle, chosen, *back)
    if getattr(module, "has_post_expert_norm", False):  # of later releases
        out = module.post_expert_norm(out)
    return (out * shares.unsqueeze(-1)).sum(1).to(x.dtype)


def _weight(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight [N,F,E] of all experts, and their bias."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return (weight.transpose(1, 2) if module.is_transposed else weight), bias


def replaced_experts(model: nn.Module) -> Replaced:
    """The modules of experts on the interface."""
    known: dict[Any, str | None] = {}
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, flag) for flag in (*_FLAGS, "_apply_gate", "config")):
            shapes = tuple((weight.shape, weight.dtype) for weight in module.parameters())
            reasons[name] = tried(module, (type(module), shapes), known, _difference)
    return Replaced("experts of up to 16 rows", "modules", reasons, ExpertsForward)


def _difference(module: Any) -> str | None:
    """How ours differs from the class's own forward, on its own weights; None if it does not."""
    if not _is_stock(module):
        return "they are computed in a way of somebody's own, or by several processes"
    back, _ = _weight(module, "down_proj")
    count, width = back.shape[:2]
    x, generator = trial_rows(width, back.dtype), torch.Generator("cpu").manual_seed(0)
    most = min(count, 2)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:most] for _ in x])
    shares = torch.rand(chosen.shape, generator=generator).to(back.dtype)
    given = _run(module, x, chosen, shares)
    if given is None:
        return f"no kernel multiplies weights such as these in {back.dtype} here"
    return difference(given, type(module).forward(module, x, chosen, shares))
