"""The Transformers model inside what people hold: a PEFT model, a compiled one, a pipeline."""

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import UnsupportedError
from headwise.hf.module_hook import NAME
from headwise.spec.families import FAMILIES


def inner_model(function: str, given: Any) -> PreTrainedModel:
    """The `PreTrainedModel` that was given, or the only one inside it.

    `given` may be any module that holds one, as what PEFT, torch.compile or
    DistributedDataParallel make, or an object whose `model` is one or holds one: a pipeline, a
    Trainer. A model that is a part of another counts as its part.

    Raises:
        UnsupportedError: there is none, or more than one; the message begins with `function`.
    """
    inside = inner_models(given)
    if len(inside) == 1:
        return next(iter(inside.values()))
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    if not inside:
        raise UnsupportedError(
            f"{function} was given {'the class' if isinstance(given, type) else 'a'} {kind}, "
            "expected a Transformers PreTrainedModel, or what holds one (a PEFT model, a compiled "
            "one, a pipeline)"
        )
    raise UnsupportedError(
        f"{function} was given a {kind} that holds {len(inside)} Transformers models: give one of "
        f"them, {named_parts(inside)}"
    )


def inner_models(given: Any) -> dict[str, PreTrainedModel]:
    """The outermost `PreTrainedModel`s of `given`, by the names of their attributes."""
    if isinstance(given, PreTrainedModel):
        return {"": given}
    if isinstance(given, nn.Module):
        models = {
            name: module
            for name, module in given.named_modules()
            if isinstance(module, PreTrainedModel)
        }
        # whichever is met first: a model may be held beside one of its parts
        parts = {id(part) for whole in models.values() for part in whole.modules() if part != whole}
        return {name: module for name, module in models.items() if id(module) not in parts}
    model = getattr(given, "model", None)
    if isinstance(given, type) or not isinstance(model, nn.Module):
        return {}
    return {f"model.{name}".rstrip("."): part for name, part in inner_models(model).items()}


def named_parts(inside: dict[str, PreTrainedModel]) -> str:
    """The models that `inner_models` found, for a message."""
    return ", ".join(f".{name} ({type(part).__name__})" for name, part in inside.items())


def takes_interface(kind: Any) -> bool:
    """Whether the class takes its attention from Transformers' attention interface.

    Transformers reads the file of the class to find out, and says no where there is none, as in a
    notebook. Such a class is what its base is: its attention comes from there, or from the models
    that it holds.
    """
    for base in kind.__mro__:
        if base is PreTrainedModel or not issubclass(base, PreTrainedModel):
            return False
        if has_source(base):
            takes: bool = base._can_set_attn_implementation()
            return takes
    return False


OFF_THE_INTERFACE = "does not take its attention from Transformers' attention interface"


def refused_by_name(family: str, reason: str) -> UnsupportedError:
    """The error for `attn_implementation="headwise"` on a family that cannot run so."""
    return UnsupportedError(
        f'attn_implementation="{NAME}" is not for {family}, which {reason}: load it without, and '
        "see whether headwise.attach(model) knows it"
    )


def refusal(kind: Any, family: str) -> str | None:
    """Why attention of this class, of the model_type `family`, cannot be replaced; None if it can.

    What stock runs on SDPA needs no more than SDPA has; of other families a reader has to know.
    """
    if not takes_interface(kind):
        return OFF_THE_INTERFACE
    if not kind._supports_sdpa and family not in FAMILIES:
        return (
            "has no spec reader, and no SDPA in Transformers either, so that what its attention "
            "needs is not known"
        )
    return None


def has_source(kind: type) -> bool:
    """Whether the file of the class can be read."""
    try:
        inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return False
    return True
