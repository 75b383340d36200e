"""Block indexers (MiniMax-M3): blocks of keys by their largest score, for each kv head.

The module's forward is run up to its product with the keys; scores and choice are made in parts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headwise.hf.indexers.cut import Indexer
from headwise.hf.indexers.trial import rotation, twin_of
from headwise.hf.module_hook import makes_graph

# Scores that exist at once, and keys that are widened at once.
_MOST, _KEYS = 2**22, 4096
_TRIED, _BLOCK, _KEPT = 37, 4, 3
# An attribute of chosen blocks: the queries' positions, where they are not the cache's last slots.
POSITIONS = "_headwise_positions"


class BlockIndexer(Indexer):
    """int64 [B, I, S, n], -1 behind the last: the blocks that each query attends to."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The blocks of keys, which are counted from the cache's first slot."""
        given = self.given(args, kwargs)
        if makes_graph() or not self.is_same(self.owner):
            chosen: Tensor = self.stock(**given)
            return chosen
        cache = _Layers(given.get(self.cache))
        try:
            with _Stop() as stop:
                self.stock(**{**given, self.cache: cache})
        except _Stopped:
            query = stop.query
        assert cache.all is not None
        scores = _block_scores(
            query.to(cache.all.dtype), cache.all, given["position_ids"], self.owner.block_size
        )
        kept, position = self._kept(scores, given["position_ids"]), given["position_ids"]
        context, length = cache.all.shape[2], position.shape[-1]
        slots = torch.arange(context - length, context, device=position.device)
        if not bool((position == slots).all()):  # whoever has no mask has to hide by them
            setattr(kept, POSITIONS, position)
        return kept

    def _kept(self, scores: Tensor, position: Tensor) -> Tensor:
        """The largest of scores [B,I,S,blocks], those next to each query's own block before all."""
        module = self.owner
        if module.local_blocks > 0:
            near = torch.arange(module.local_blocks, device=scores.device)
            local = (position.unsqueeze(-1) // module.block_size - near).clamp(min=0)
            local = local.unsqueeze(1).expand(-1, scores.shape[1], -1, -1)
            scores = scores.scatter(-1, local, float("inf"))
        top = scores.topk(min(module.topk_blocks, scores.shape[-1]), dim=-1)
        return top.indices.masked_fill(top.values == float("-inf"), -1)


def _block_scores(query: Tensor, keys: Tensor, position: Tensor, size: int) -> Tensor:
    """The largest score of every block, float32 [B,I,S,blocks]; -inf where a query sees none."""
    batch, heads, length, _ = query.shape
    context = keys.shape[2]
    scores = query.new_empty(batch, heads, length, -(-context // size), dtype=torch.float32)
    step = max(size, _KEYS // size * size)
    each = max(1, _MOST // max(1, batch * heads * min(step, context)))
    every = torch.arange(context, device=query.device)
    for start in range(0, context, step):
        part = keys[:, :, start : start + step].float().transpose(-1, -2)
        blocks = slice(start // size, -(-min(start + step, context) // size))
        for first in range(0, length, each):
            rows = slice(first, first + each)
            score = query[:, :, rows].float() @ part
            future = every[start : start + step] > position[:, None, rows, None]
            score = score.masked_fill_(future, float("-inf"))
            missing = (blocks.stop - blocks.start) * size - score.shape[-1]
            if missing:
                score = torch.nn.functional.pad(score, (0, missing), value=float("-inf"))
            scores[:, :, rows, blocks] = score.unflatten(-1, (-1, size)).amax(dim=-1)
    return scores


class _Layers:
    """Stands in for a cache, and for its layer: takes an indexer's keys, and returns the new."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.all: Tensor | None = None
        self.layer = 0

    @property
    def layers(self) -> "_Layers":
        return self

    def __getitem__(self, layer: int) -> "_Layers":
        self.layer = layer
        return self

    def update_index(self, keys: Tensor) -> Tensor:
        """Keys [B,1,S,E]."""
        held = self.cache
        self.all = keys if held is None else held.layers[self.layer].update_index(keys)
        return keys


class _Stopped(Exception):
    """The forward has come to its product."""


class _Stop(TorchFunctionMode):
    """While open, the first product of matrices stops everything."""

    query: Tensor

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.matmul:
            self.query = args[0]
            raise _Stopped
        return function(*args, **(kwargs or {}))


def block_difference(module: Any) -> str | None:
    """How its choice differs; None if it does not."""
    if module.num_heads not in (1, module.config.num_key_value_heads):
        return f"its indexer has {module.num_heads} heads, which are not the kv heads"
    changes = {"block_size": _BLOCK, "topk_blocks": _KEPT, "local_blocks": 1}
    twin, random = twin_of(module, **changes)
    given = {
        "hidden_states": random(1, _TRIED, module.q_proj.in_features),
        "position_embeddings": rotation(random, _TRIED, module.head_dim),
        "cache": None,
        "position_ids": torch.arange(_TRIED).unsqueeze(0),
    }
    hook = BlockIndexer(twin)
    given[hook.cache] = given.pop("cache")
    theirs, ours = hook.stock(**given), hook(**given)
    if theirs.shape != ours.shape or not torch.equal(theirs.sort().values, ours.sort().values):
        return "its indexer chooses other blocks than those of the largest scores"
    return None
