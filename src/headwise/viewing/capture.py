"""Weights of a running model: chosen rows in full and all rows pooled, layer by layer as it runs.

Everything is computed from the queries, the keys and the log-sum-exp of the call that just ran. Of
its queries only the chosen rows' scores stay; the matrix of all weights never exists.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, UnsupportedError
from headwise.hf.observer import Seen
from headwise.viewing.layer import LayerView
from headwise.viewing.record import LayerRecord, Wanted
from headwise.viewing.scored_call import ScoredCall


class Capture:
    """An observer (`headwise.hf.observer`) that keeps what `wanted` says of one model's run.

    `silent` maps a layer to heads whose output is replaced by zeros.
    """

    def __init__(
        self, model: nn.Module, wanted: Wanted, silent: dict[int, list[int]] | None = None
    ) -> None:
        self.wanted, self.silent = wanted, silent or {}
        self.modules = {id(module) for module in model.modules()}
        self.layers: dict[int, LayerRecord] = {}
        self.indices: dict[int, int] = {}

    def __call__(self, seen: Seen) -> Tensor:
        if id(seen.module) not in self.modules:
            return seen.out
        index = self._index(seen.module)
        chosen = self.wanted.layers is None or index in self.wanted.layers
        if chosen and self.wanted.tokens:
            with torch.no_grad():
                self._record(seen, index)
        return silenced(seen.out, self.silent.get(index, []), index)

    def views(self, tokens: int) -> list[LayerView]:
        """What was seen, by layer, cut to the `tokens` that there were in the end.

        Raises:
            UnsupportedError: nothing was seen.
            OptionError: none of the chosen layers was seen.
        """
        if not self.indices:
            raise UnsupportedError(
                "no attention of this model runs on headwise; see headwise.attach"
            )
        if not self.layers:
            known = sorted(self.indices.values())
            raise OptionError(f"no layer was chosen that runs on headwise; it has {known}")
        return [self.layers[index].finished(tokens) for index in sorted(self.layers)]

    def _index(self, module: Any) -> int:
        """The module's own index where it has one that is free, or else the next free one."""
        if id(module) not in self.indices:
            own, taken = getattr(module, "layer_idx", None), set(self.indices.values())
            index = own if isinstance(own, int) and own not in taken else len(taken)
            self.indices[id(module)] = index if index not in taken else max(taken) + 1
        return self.indices[id(module)]

    def _record(self, seen: Seen, index: int) -> None:
        if seen.query.shape[0] != 1:
            raise UnsupportedError(f"a view is of one sequence, and {seen.query.shape[0]} ran")
        if seen.columns is not None:
            raise UnsupportedError(
                "a window cache with sinks has dropped keys: attach with another cache to view"
            )
        layer, asked = self.layers.get(index), seen.query.shape[2]
        # more queries than all before, and no keys but theirs: the model reads the text anew, as
        # Phi-3 does where its short factors end
        anew = layer is not None and asked == seen.key.shape[2] > layer.done
        if layer is None or anew:
            layer = self.layers[index] = LayerRecord(seen, index, self.wanted)
        call = ScoredCall(seen, layer.done)
        layer.done += asked
        for group in call.groups(layer.view.heads):
            call.keep_rows(layer.view, group)
            if layer.pool is not None:
                call.pool_rows(layer.pool, group)


def silenced(out: Tensor, heads: Iterable[int], layer: int) -> Tensor:
    """`out` [B,S,H,V] with the output of some heads replaced by zeros.

    Raises:
        OptionError: a head that the layer does not have.
    """
    for head in heads:
        if head >= out.shape[2]:
            raise OptionError(f"layer {layer} has heads 0 to {out.shape[2] - 1}, not {head}")
        out = out.clone()
        out[:, :, head] = 0.0
    return out
