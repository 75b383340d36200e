"""Indexers of sparse attention: what chooses the keys that a layer attends to.

A file for each way to choose finds out whether a module chooses so, by a trial with random numbers,
and has what stands in for its `forward`. Projections, norms and rotation stay the module's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from headwise.hf.indexers.blocks import BlockIndexer, block_difference
from headwise.hf.indexers.lightning import LightningIndexer, lightning_difference
from headwise.hf.indexers.pooled import POOLED
from headwise.hf.module_hook import ModuleHook, is_touched

__all__ = ["MASK_BUILDER", "Chooser", "chooses_tokens", "hands_a_mask", "indexers"]

# By which GLM-5.3 makes its mask of what was chosen.
MASK_BUILDER = "build_attention_mask_from_topk"

Chooser = Callable[[Any], ModuleHook]
# What a module raises that does something else with what it is given.
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# How a module can choose: whether it does, and what stands in for its forward.
_WAYS: tuple[tuple[Callable[[Any], str | None], Chooser], ...] = (
    (lightning_difference, LightningIndexer),
    *POOLED,
    (block_difference, BlockIndexer),
)


def chooses_tokens(module: Any) -> bool:
    """Whether it attends to tokens that an indexer chooses: its own, or that of a layer before."""
    return getattr(module, "indexer", None) is not None or getattr(module, "skip_topk", False)


def hands_a_mask(module: Any) -> bool:
    """Whether its attention function is given a mask of what was chosen, made by a method."""
    return (
        chooses_tokens(module)
        and MASK_BUILDER not in module.__dict__
        and hasattr(type(module), MASK_BUILDER)
    )


def indexers(model: nn.Module) -> dict[str, Chooser | str]:
    """The indexers of a model, by name: what stands in for its forward, or why it stays stock's."""
    found: dict[str, Chooser | str] = {}
    tried: dict[type, Chooser | str] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "indexer":
            continue
        kind = type(module)
        if kind not in tried:
            tried[kind] = _way(module)
        found[name] = "its indexer has hooks" if is_touched(module) else tried[kind]
    return found


def _way(module: Any) -> Chooser | str:
    """What chooses as the module does, or how it differs from all that there is."""
    said = f"its indexer, a {type(module).__name__}, chooses in a way of its own"
    for difference, chooser in _WAYS:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                reason = difference(module)
        except _FAULTS:  # it is made of other parts
            continue
        if reason is None:
            return chooser
        said = reason
    return said
