"""Families that are not on Transformers' interface: a class each, and a line in `_FORWARDS`."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from headwise.hf.families.bloom import BloomForward
from headwise.hf.families.falcon import FalconForward, cache_note
from headwise.hf.families.gpt_neo import GptNeoForward, GptNeoXJapaneseForward
from headwise.hf.families.mpt import MptForward
from headwise.hf.inner_model import OFF_THE_INTERFACE, refused_by_name
from headwise.hf.module_hook import NAME, ModuleHook
from headwise.hf.stock_names import FALCON_ATTENTION_CLASSES, GPT_NEO_ATTENTION_CLASSES

__all__ = ["cache_note", "forward_obstacle", "off_interface", "refuse_name", "replace_forward"]

# The class in Transformers' modeling file, and what stands in for its forward.
_FORWARDS: Mapping[str, type[ModuleHook]] = {
    "FalconAttention": FalconForward,
    "BloomAttention": BloomForward,
    "MptBlock": MptForward,
    "GPTNeoSelfAttention": GptNeoForward,
    "GPTNeoXJapaneseAttention": GptNeoXJapaneseForward,
}


class _RefusedByName:
    """In a family's table of attention classes: an error that says what to do, not a KeyError."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        raise refused_by_name(config.model_type, OFF_THE_INTERFACE)


def refuse_name() -> None:
    """Have the decoders that look their class up by the name refuse ours with a reason."""
    for classes in (FALCON_ATTENTION_CLASSES, GPT_NEO_ATTENTION_CLASSES):
        classes[NAME] = _RefusedByName


def off_interface(model: PreTrainedModel) -> dict[str, Any]:
    """The attention modules whose forward has to be replaced, by name; none in other families."""
    return {
        name: module for name, module in model.named_modules() if _class_name(module) is not None
    }


def _class_name(module: Any) -> str | None:
    """The name in `_FORWARDS` that the module's class has or inherits from."""
    names = (
        base.__name__
        for base in type(module).__mro__
        if base.__module__.startswith("transformers.")
    )
    return next((name for name in names if name in _FORWARDS), None)


def forward_obstacle(module: Any) -> str | None:
    """Why the forward of one of `off_interface` cannot be replaced; None if it can."""
    if type(module).__name__ not in _FORWARDS:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
        return "slow_but_exact multiplies in slices"
    return None


def replace_forward(module: Any) -> None:
    """Put our forward on one of `off_interface`."""
    module.forward = _FORWARDS[type(module).__name__](module)
