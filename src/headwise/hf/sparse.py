"""Sparse attention of an attached model: which layers choose keys, and the choice of a call."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.caches import CacheChoice
from headwise.errors import UnsupportedError
from headwise.hf.cached_rows import SparseKV
from headwise.ops import Budget, Options, choose_keys
from headwise.spec import ModelSpec, SparseChoice

# Queries of a sequence up to which a call is one of decoding; more see all keys.
MOST_QUERIES = 16
# Of a cache on disk, unless something else is asked for.
_ON_DISK = "topk:1024"


def choice_of(sparse: str | None, cache: CacheChoice) -> SparseChoice | None:
    """What `attach` was asked for: None where queries see all keys.

    Raises:
        OptionError: no such sparse attention.
    """
    if sparse is None and not cache.folder:
        return None
    return None if sparse == "all" else SparseChoice.parse(_ON_DISK if sparse is None else sparse)


@dataclass(frozen=True)
class SparseLayers:
    """What `attach` was asked for, and the layers that see all keys all the same, with the reason.

    dense: by the layer's index.
    """

    choice: SparseChoice
    dense: dict[int, str] = field(default_factory=dict)

    def words(self, index: int) -> str:
        """What a layer does, for a report."""
        if index in self.dense:
            return f"a query sees all keys: {self.dense[index]}"
        least = self.choice.least
        return (
            f"a query of a step that has read more than {least:,} tokens gets {self.choice.words}"
        )

    def of(self, index: int) -> SparseChoice | None:
        """The choice of a layer, None where it sees all keys."""
        return None if index in self.dense else self.choice


def sparse_layers(
    model: Any, spec: ModelSpec | None, cache: CacheChoice, choice: SparseChoice, grows_cache: bool
) -> SparseLayers:
    """Which layers of a model choose.

    Raises:
        UnsupportedError: none can.
    """
    name = type(model).__name__
    if not grows_cache:
        raise UnsupportedError(
            f"sparse={str(choice)!r}, and {name} has no cache that grows: leave it out"
        )
    if cache.make().gives == "part":
        raise UnsupportedError(
            f"sparse={str(choice)!r} chooses among all tokens, and cache={str(cache)!r} drops "
            "some: leave one of them out"
        )
    if spec is None:
        family = model.config.get_text_config(decoder=True).model_type
        raise UnsupportedError(
            f"sparse={str(choice)!r}, and no spec reader says which layers of {name} (model_type "
            f"{family!r}) can choose their keys: leave it out"
        )
    dense = choice.obstacles(spec.layers)
    if len(dense) == len(spec.layers):
        attending = [dense[at.index] for at in spec.layers if at.attention is not None]
        reason = attending[-1] if attending else "it has no attention"
        raise UnsupportedError(
            f"sparse={str(choice)!r}, and no layer of {name} can choose its keys: {reason}"
        )
    return SparseLayers(choice, dense)


def choose_for(
    kv: SparseKV, query: Tensor, options: Options, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """The keys of each query, int32 [B,K,S,most], and what the others count: `Request.rest`.

    None where the call is one that sees all keys.
    """
    plain = (options.bias, options.alibi_slopes, options.window, options.indices)
    if any(each is not None for each in (*plain, options.block_indices)):
        return None
    one_for_all = mask is None or (mask.ndim == 4 and mask.shape[1] == 1)
    if query.shape[2] > MOST_QUERIES or not one_for_all or not (options.causal or mask is not None):
        return None
    chosen, rest = chosen_keys(kv, query, options, mask)
    kv.read_ahead(chosen)
    if rest is None:
        return chosen, None
    return chosen, (rest, kv.means if mask is None else _means_under(mask, kv))


def _means_under(mask: Tensor, kv: SparseKV) -> Tensor:
    """The means of the values that a mask [B|1,1,S,L] shows, float32 [B,K,S,V].

    What it hides is subtracted from the means of all: a little, where that is padding.
    """
    queries, context = mask.shape[2], mask.shape[3]
    counts = torch.arange(context - queries + 1, context + 1, device=mask.device).view(-1, 1)
    hidden = ~mask & (torch.arange(context, device=mask.device) < counts)
    columns = hidden.flatten(0, 2).any(dim=0).nonzero()
    if not len(columns):
        return kv.means
    begin, end = int(columns[0]), int(columns[-1]) + 1
    hidden = hidden[..., begin:end].float()
    total = kv.means * counts - hidden @ kv.values(begin, end).float()
    return total / (counts - hidden.sum(dim=-1, keepdim=True)).clamp(min=1)


def chosen_keys(
    kv: SparseKV, query: Tensor, options: Options, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The keys of each query, int32 [B,K,S,most], by the sketch, and the rest [B,H,S].

    None of a rest stands for one that counts nothing.
    """
    return choose_keys(
        query,
        kv.sketch,
        Budget.of(kv.rule),
        causal=options.causal,
        scale=options.scale,
        softcap=options.softcap,
        sinks=options.sinks,
        mask=mask,
    )
