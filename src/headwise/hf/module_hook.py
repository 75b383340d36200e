"""What `attach` puts on a model: small objects that know it, pickle with it, and do not keep it."""

import weakref
from typing import Any

from torch import nn

# Under this name a model's config asks for headwise.
NAME = "headwise"


_CAPTURING = "transformers.utils.output_capturing"


class AttachedName(str):
    """The name in the configs of an attached model: what it needs has been looked at."""

    __slots__ = ()


ATTACHED = AttachedName(NAME)


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


def remember(*kinds: type[nn.Module]) -> None:
    """Look at classes, unless that was done."""
    for kind in kinds:
        _FIRST.setdefault(kind, kind.forward)


def is_as_first(kind: type[nn.Module]) -> bool:
    """Whether a class that was looked at still has the forward that it had then."""
    return bool(kind.forward is _FIRST.get(kind))
