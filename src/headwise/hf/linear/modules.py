"""A module of linear attention runs its own forward, with our operators in it.

Such a module makes queries, keys, values, decays and betas, and hands them to functions of its
file: one for a prompt in chunks, one for a step, and two for a convolution. Ours runs the same
forward with our operators under those names. A trial at `attach` compares them with what the file
has.
"""

import inspect
import logging
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.linear.kinds import KINDS, Kind
from headwise.hf.module_hook import (
    ClassHook,
    has_hooks,
    is_as_first,
    is_touched,
    makes_graph,
    remember,
)

# How near our functions are to the files', on numbers in float32.
_TOLERANCE = 1e-4
# Old names of an argument, for which stock's own wrapper knows the new one.
_RENAMED = frozenset({"cache_params", "past_key_values"})
# What a function raises that is called otherwise.
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class LinearModule(ClassHook):
    """Stands in for the `forward` of a module of linear attention."""

    def __init__(self, owner: nn.Module, kind: Kind) -> None:
        super().__init__(owner)
        self.attention = kind
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_forward": None, "_names": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _prepare(self) -> None:
        """Make the forward that runs, and remember the names of the file that it uses."""
        self._forward = _with_ours(self.kind, self.attention)
        self._names = _used(self.kind, self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives."""
        module = self.owner
        renamed = not _RENAMED.isdisjoint(kwargs)
        same = (
            not renamed and self.is_same(module) and self._names == _used(self.kind, self.attention)
        )
        if makes_graph() or torch.is_grad_enabled() or not same or _is_held(module):
            return type(module).forward(module, *args, **kwargs)
        return self._forward(module, *args, **kwargs)


def _is_held(module: nn.Module) -> bool:
    """Whether somebody's hooks want to see a part whose weights are read without calling it."""
    return any("_hf_hook" in part.__dict__ or has_hooks(part) for part in module.children())


def _plain(kind: type[nn.Module]) -> FunctionType | None:
    """The forward of a class as it stands in its file, without what wraps it."""
    # as it lies there: that of a traced module cannot be asked for
    function: Any = inspect.unwrap(inspect.getattr_static(kind, "forward", None))
    return function if isinstance(function, FunctionType) else None


def _used(kind: type[nn.Module], attention: Kind) -> dict[str, int]:
    """What a class's forward finds in its file by name: somebody may put something else there."""
    plain = _plain(kind)
    assert plain is not None
    names = plain.__globals__
    used = (*plain.__code__.co_names, *attention.helpers)
    return {name: id(names[name]) for name in used if name in names}


def _with_ours(kind: type[nn.Module], attention: Kind) -> Callable[..., Any]:
    """The forward of a class, with our operator under the names that it calls."""
    plain = _plain(kind)
    assert plain is not None
    code: CodeType = plain.__code__
    names = plain.__globals__
    ours = {each.name: each.ours(names[each.name]) for each in attention.functions}
    function = FunctionType(
        code, names | ours, plain.__name__, plain.__defaults__, plain.__closure__
    )
    function.__kwdefaults__ = plain.__kwdefaults__
    return function


def linear_modules(model: nn.Module) -> dict[str, Kind | str]:
    """The modules of linear attention, by name: their kind, or why one stays with Transformers."""
    found: dict[str, Kind | str] = {}
    tried: dict[type, str | None] = {}
    for name, module in model.named_modules():
        kind = type(module)
        attention = _kind(kind)
        if attention is None:
            continue
        if kind not in tried:
            tried[kind] = _difference(kind, attention)
        reason = tried[kind]
        if is_touched(module) or _is_held(module):
            reason = "it has hooks, or a part of it"
        found[name] = attention if reason is None else f"{attention.name}: {reason}"
    return found


def _kind(kind: type[nn.Module]) -> Kind | None:
    plain = _plain(kind)
    if plain is None:
        return None
    called = set(plain.__code__.co_names) & plain.__globals__.keys()
    for attention in KINDS:
        if called.issuperset(each.name for each in attention.functions):
            return attention
    return None


def _difference(kind: type[nn.Module], attention: Kind) -> str | None:
    """How our operator differs from the functions of the class's file; None if it does not."""
    plain = _plain(kind)
    assert plain is not None
    remember(kind)
    if not is_as_first(kind):
        return "its class has another forward"
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        # the functions warn that packages are missing, which is of no concern where ours run
        logger.setLevel(logging.ERROR)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for each in attention.functions:
                stock = plain.__globals__[each.name]
                if not all(map(_near, each.tried(each.ours(stock)), each.tried(stock))):
                    return f"{each.name} of its file gives something else"
    except _FAULTS as error:
        fault = str(error).partition("\n")[0]
        return f"the functions of its file cannot be tried ({type(error).__name__}: {fault})"
    finally:
        logger.setLevel(level)
    return None


def _near(ours: Tensor, stock: Tensor) -> bool:
    bound = _TOLERANCE * (1 + float(stock.abs().max()))
    return ours.shape == stock.shape and bool((ours - stock).abs().max() <= bound)
