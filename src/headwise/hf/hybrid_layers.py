"""Cache layers of models that attend and keep a state in the same layer (Falcon H1, Zamba 2)."""

from typing import Any

import torch
from torch import Tensor

from headwise.hf.cache_layers import ContiguousLayer, OwnLayer, SinksLayer, ViewLayer
from headwise.hf.stock_names import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

# What Transformers' layer of a state has of its own.
OF_STATES = (
    *("number_of_states", "conv_states", "recurrent_states", "conv_kernel_size"),
    *("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"),
    "record_past",
)


class HybridLayer(LinearAttentionLayer, ContiguousLayer):
    """Every token in a cache of ours, and beside it the states as Transformers keeps them."""

    is_compileable = False

    def __init__(self, cache: Any, number_of_states: int) -> None:
        ContiguousLayer.__init__(self, cache)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def __copy__(self) -> "HybridLayer":
        twin: Any = OwnLayer.__copy__(self)
        for name in OF_STATES:
            value = getattr(self, name)
            if isinstance(value, dict):  # states are written in place
                value = {
                    index: each.clone() if isinstance(each, Tensor) else each
                    for index, each in value.items()
                }
            setattr(twin, name, value)
        return twin

    def lazy_initialization(self, *rows: Tensor, **states: Any) -> None:
        """Allocate for keys and values like these two, or for states given by name."""
        if rows:
            ContiguousLayer.lazy_initialization(self, *rows)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; refused as by Transformers for states."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        ContiguousLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        ContiguousLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        ContiguousLayer.reorder_cache(self, beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        ContiguousLayer.batch_repeat_interleave(self, repeats)
        self._select(self._sequences().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`: whatever can index the batch dimension."""
        ContiguousLayer.batch_select_indices(self, indices)
        self._select(self._sequences()[indices])

    def offload(self) -> None:
        """Move what is held to main memory."""
        ContiguousLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move what is held back to where it was made."""
        ContiguousLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def _sequences(self) -> Tensor:
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return torch.arange(max((len(state) for state in held if state is not None), default=0))

    def _select(self, index: Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for name, state in states.items():
                if state is not None:
                    states[name] = state.index_select(0, index.to(state.device))

    def _stock(self) -> Any:
        stock = LinearAttentionAndFullAttentionLayer(number_of_states=self.number_of_states)
        for name in OF_STATES:
            setattr(stock, name, getattr(self, name))
        return stock


class HybridViewLayer(HybridLayer, ViewLayer):
    """The same with the tokens in pages or as integers."""

    def __init__(self, cache: Any, number_of_states: int) -> None:
        ViewLayer.__init__(self, cache)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


class HybridSinksLayer(HybridLayer, SinksLayer):
    """The same with a window of the tokens and the first ones."""

    def activate_past_recording(self) -> None:
        """Keep every token and input until the next `crop`, as assisted decoding asks."""
        SinksLayer.activate_past_recording(self)
        LinearAttentionLayer.activate_past_recording(self)

    def _stock(self) -> Any:
        SinksLayer._stock(self)  # refuses where tokens are gone
        return HybridLayer._stock(self)
