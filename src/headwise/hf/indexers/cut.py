"""How a module's forward is run up to the point where its products with the keys begin."""

import inspect
from typing import Any

from torch import Tensor, nn

from headwise.hf.module_hook import ClassHook
from headwise.hf.own_cache import CACHE_ARGUMENTS


class Indexer(ClassHook):
    """Stands in for the `forward` of an indexer."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self.cache = next(name for name in CACHE_ARGUMENTS if name in self.names)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def stock(self, **given: Any) -> Any:
        """What the module's own forward makes of them."""
        return type(self.owner).forward(self.owner, **given)


class Keys:
    """Stands in for the cache of an indexer: takes its keys, and gives none of them back.

    all: every key, once they are taken.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.all: Tensor | None = None

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        """Keys [B,S,E]."""
        self.all = keys if self.cache is None else self.cache.update_indexer(keys, layer)
        return keys[:, :0]


class Taken:
    """Stands in for a cache that has taken an indexer's keys already: gives them, and all else."""

    def __init__(self, cache: Any, keys: Tensor) -> None:
        self._cache, self._keys = cache, keys

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        """All keys [B,L,E]."""
        return self._keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
