"""What `attach` puts on a model: small objects that know it, pickle with it, and do not keep it."""

import os
import weakref
from typing import Any

import torch
import transformers
from torch import nn

# Under this name a model's config asks for headwise.
NAME = "headwise"


_CAPTURING = "transformers.utils.output_capturing"


class AttachedName(str):
    """The name in the configs of an attached model: what it needs has been looked at."""

    __slots__ = ()


ATTACHED = AttachedName(NAME)


def makes_graph() -> bool:
    """Whether a graph is made, by a compiler or a tracer: nothing without memory may enter it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


class StockConfig:
    """A config for modules that stay with Transformers: the model's, but for our name.

    instead: the implementation where the model was loaded with our name.
    """

    def __init__(self, config: Any, instead: str) -> None:
        loaded = config._attn_implementation
        self.config, self.implementation = config, instead if loaded == NAME else loaded

    @property
    def _attn_implementation(self) -> Any:
        now = self.config._attn_implementation
        return self.implementation if now == NAME else now

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # copying and unpickling ask before it is set
            raise AttributeError(name)
        return getattr(self.config, name)


class ModuleHook:
    """Holds its owner weakly, so that a model is freed as soon as its last user lets go.

    Pickled or copied together with its owner, it belongs to the owner's copy.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The module that this object was put on."""
        owner = self._owner()
        assert owner is not None
        return owner

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner = weakref.ref(state["owner"])


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks run at its call.

    Transformers' own, which it leaves after it has captured outputs, do nothing until it captures
    again.
    """
    own = module.__dict__
    if not own["_forward_hooks"] and not own["_forward_pre_hooks"]:
        return False
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return any(getattr(hook, "__module__", "") != _CAPTURING for hook in hooks)


def is_touched(module: nn.Module) -> bool:
    """Whether a module has a forward that is not its class's or ours, or hooks."""
    forward = module.__dict__.get("forward")
    return has_hooks(module) or (forward is not None and not isinstance(forward, ModuleHook))


# What classes had when they were first looked at: other libraries put functions of their own there.
_FIRST: dict[type, Any] = {}
# Where functions are that are not somebody else's.
_KNOWN = tuple(os.path.dirname(file) for file in (transformers.__file__, torch.__file__))


def _functions(kind: type[nn.Module]) -> tuple[Any, Any]:
    """The forward of a class, and the helper that Transformers' norms have."""
    return kind.forward, getattr(kind, "_norm", None)


def remember(*kinds: type[nn.Module]) -> None:
    """Look at classes, unless that was done; what somebody else put there does not count."""
    for kind in kinds:
        code = getattr(kind.forward, "__code__", None)
        known = code is not None and code.co_filename.startswith(_KNOWN)
        _FIRST.setdefault(kind, _functions(kind) if known else None)


def is_as_first(kind: type[nn.Module]) -> bool:
    """Whether a class that was looked at still has the forward that it had then."""
    return _functions(kind) == _FIRST.get(kind)


class ClassHook(ModuleHook):
    """A hook for a module whose class has to be, and to do, what it was at `attach`."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.kind = type(owner)
        remember(self.kind)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **super().__getstate__(), "_owner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({"owner": self.__dict__.pop("owner")})
        remember(self.kind)

    def is_same(self, module: nn.Module) -> bool:
        """Whether the module is of that class, and nobody has changed the class."""
        return type(module) is self.kind and is_as_first(self.kind)


def reads(kind: type[nn.Module]) -> set[str]:
    """The names that a class's forward and its helper use: attributes, functions, modules.

    Of a function that is not plain code, its own name, which is none that anybody expects.
    """
    names = set[str]()
    for function in filter(None, _functions(kind)):
        code = getattr(function, "__code__", None)
        if code is None or code.co_freevars:
            names.add(repr(function))
        else:
            names.update(code.co_names)
    return names


def parameters_of(module: nn.Module) -> dict[str, bool]:
    """The names that are parameters, and whether there is one."""
    return {name: value is not None for name, value in module._parameters.items()}
