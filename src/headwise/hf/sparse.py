"""Sparse attention of an attached model: which layers choose keys, and the choice of a call."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headwise.caches import CacheChoice
from headwise.errors import UnsupportedError
from headwise.hf.cached_rows import SparseKV
from headwise.ops import Budget, Options, choose_keys, means_under
from headwise.spec import ModelSpec, SparseChoice

# Queries of a sequence up to which a call is one of decoding; more see all keys.
MOST_QUERIES = 16


@dataclass(frozen=True)
class SparseLayers:
    """What `attach` was asked for, and the layers that see all keys all the same, with the reason.

    dense: by the layer's index. Where the family has no reader, nothing is known before a call.
    """

    choice: SparseChoice
    dense: dict[int, str] = field(default_factory=dict)

    def words(self, index: int | None) -> str:
        """What a layer does, for a report; None stands for all layers of an unknown model."""
        if index is not None and index in self.dense:
            return f"a query sees all keys: {self.dense[index]}"
        words = f"a query of a step that has read more than {self.choice.least:,} tokens gets "
        words += self.choice.words
        return words if index is not None else f"{words}, where a call can"

    def of(self, index: int) -> SparseChoice | None:
        """The choice of a layer, None where it sees all keys."""
        return None if index in self.dense or index < self.choice.dense else self.choice


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
        return SparseLayers(choice)
    dense = dict[int, str]()
    for layer in spec.layers:
        reason = choice.obstacle(layer.attention, layer.index)
        if reason is not None:
            dense[layer.index] = reason
    if len(dense) == len(spec.layers):
        attending = [dense[at.index] for at in spec.layers if at.attention is not None]
        reason = attending[-1] if attending else "it has no attention"
        raise UnsupportedError(
            f"sparse={str(choice)!r}, and no layer of {name} can choose its keys: {reason}"
        )
    return SparseLayers(choice, dense)


def choose_for(
    kv: SparseKV, query: Tensor, options: Options, mask: Tensor | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """The keys of each query, int32 [B,K,S,most], and what the others count: `Request.rest`.

    None where the call is one that sees all keys.
    """
    plain = (options.bias, options.alibi_slopes, options.window, options.indices)
    if any(each is not None for each in (*plain, options.block_indices)):
        return None, None
    one_for_all = mask is None or (mask.ndim == 4 and mask.shape[1] == 1)
    if query.shape[2] > MOST_QUERIES or not one_for_all or not (options.causal or mask is not None):
        return None, None
    chosen, rest = chosen_keys(kv, query, options, mask)
    if rest is None:
        return chosen, None
    means = kv.means if mask is None else means_under(mask, kv.dense(query.dtype)[1])
    return chosen, (rest, means)


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
