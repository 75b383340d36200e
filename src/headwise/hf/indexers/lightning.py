"""Lightning indexers (DeepSeek-V3.2 and kin): the largest sums of relu(q . k), weighted over heads.

Such a forward makes queries, keys and weights of heads, multiplies each query with every key and
takes the largest sums. Ours runs it with no keys to multiply with, takes from it what it was about
to multiply, and chooses by `index_topk`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headwise.hf.indexers.cut import Indexer, Keys
from headwise.hf.indexers.trial import causal, rotation, twin_of
from headwise.hf.module_hook import makes_graph
from headwise.ops import index_topk

# Queries and kept keys of a trial; and how far apart two right scores may be, of the largest.
_TRIED, _KEPT, _TOLERANCE = 24, 5, 1e-4
# An attribute of chosen indices: they are all the keys that there are.
_ALL = "_headwise_all_keys"


class LightningIndexer(Indexer):
    """int32 [B, S, min(top, L)], -1 behind the last."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The keys that each query attends to."""
        module, given = self.owner, self.given(args, kwargs)
        mask = given.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 3
        if not plain or makes_graph() or not self.is_same(module):
            chosen: Tensor = self.stock(**given)
            return chosen
        query, key, weights = self.made(given)
        length, context = query.shape[1], key.shape[1]
        if context <= module.index_topk:
            every = torch.arange(context, dtype=torch.int32, device=key.device)
            every = every.expand(key.shape[0], length, -1)
            setattr(every, _ALL, True)
            return every
        return index_topk(query, key, weights, module.index_topk, mask=mask)

    def made(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,S,I,E], all keys [B,L,E] and weights [B,S,I], of the arguments of a call."""
        keys, products = Keys(given.get(self.cache)), _Products()
        cut = {**given, self.cache: keys, "attention_mask": given["attention_mask"][..., :0]}
        with products:
            self.stock(**cut)
        (query, _), (weights, _) = products.seen
        assert keys.all is not None
        # widened for the product, from numbers of the keys' dtype
        return query.to(keys.all.dtype), keys.all, weights.squeeze(-2)


class _Products(TorchFunctionMode):
    """While open, sees the products of matrices that have no columns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.matmul and args[1].shape[-1] == 0:
            self.seen.append((args[0], args[1]))
        return function(*args, **(kwargs or {}))


def all_keys(indices: Tensor) -> bool:
    """Whether chosen indices are every key that there is, so that nothing is sparse."""
    return getattr(indices, _ALL, False)


def lightning_difference(module: Any) -> str | None:
    """How its choice differs from that of `index_topk`; None if it does not."""
    twin, random = twin_of(module, index_topk=_KEPT)
    mask = causal(_TRIED)
    given: dict[str, Any] = {
        "hidden_states": random(1, _TRIED, module.wk.in_features),
        "q_resid": random(1, _TRIED, module.wq_b.in_features),
        "position_embeddings": rotation(random, _TRIED, module.qk_rope_head_dim),
        "attention_mask": mask,
        "position_ids": torch.arange(_TRIED).unsqueeze(0),
    }
    hook = LightningIndexer(twin)
    given = {name: value for name, value in given.items() if name in hook.names}
    given[hook.cache] = None
    theirs = hook.stock(**given)
    query, key, weights = hook.made(given)
    products = (query.double() @ key.double().transpose(1, 2).unsqueeze(1)).relu()
    scores = (weights.double().unsqueeze(-1) * products).sum(dim=2)
    scores = scores.masked_fill(~mask, float("-inf"))
    ours = scores.topk(_KEPT).values.min(dim=-1).values
    least = scores.gather(-1, theirs.long()).min(dim=-1).values
    distinct = all(len(set(row)) == _KEPT for row in theirs[0].tolist())
    seen = scores[scores.isfinite()].abs().max()
    # the first queries see fewer keys than are kept
    near = (ours == least) | ((ours - least).abs() <= _TOLERANCE * seen)
    if theirs.shape != (1, _TRIED, _KEPT) or not distinct or not bool(near.all()):
        return "its indexer chooses by other scores than sums of relu(q . k), weighted over heads"
    return None
