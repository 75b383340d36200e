"""The cache that an attached model makes: Transformers' own, with what it was made of."""

import copy
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import FAULTS, reason
from headwise.errors import CapacityError, UnsupportedError
from headwise.hf.stock_names import DynamicCache, LinearAttentionLayer

# What models call their cache: since Transformers 5.24; before, and until 5.40.
CACHE_ARGUMENTS = ("cache", "past_key_values")

# What a forward may be given beside tokens without another cache coming of it.
_HARMLESS = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache"),
        *("logits_to_keep", "num_logits_to_keep", "return_dict", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "labels", "cache_position"),
        *("return_shared_kv_states", "is_first_iteration"),
    }
)


class TokensRead:
    """The tokens that a cache has read, as far as they are all that it was made of.

    Attributes:
        unknown: why it is not known what the cache is of; None where it is.
        stamp: of the model when the first were read.
        first: how many were read at once, to begin with.
        loaded: whether they were read in another process, or at another time.
    """

    def __init__(self) -> None:
        self.unknown: str | None = None
        self.stamp: Any = None
        self.loaded = False
        self._checked = False
        self._model: weakref.ref[Any] | None = None
        self._parts: list[tuple[Tensor, Tensor | None]] = []  # ids, and where they are no padding
        self._padded = False
        self.length = 0
        self.first = 0  # tokens of the first forward

    @property
    def model(self) -> Any:
        """What read them; None where nothing was, or it is gone."""
        return None if self._model is None else self._model()

    @property
    def ids(self) -> Tensor:
        """[B, L], padding included."""
        return self._joined()[0]

    @property
    def real(self) -> Tensor:
        """[B, L] bool, where a token is not padding."""
        ids, real = self._joined()
        return torch.ones_like(ids, dtype=torch.bool) if real is None else real

    def begin(self, model: Any, stamp: Any, ids: Tensor, real: Tensor | None) -> None:
        """Know of a cache that was loaded, and what it is of."""
        self.loaded = True
        self._model, self.stamp = weakref.ref(model), stamp
        self.length = self.first = ids.shape[1]
        self._parts, self._padded = [(ids, real)], real is not None

    def add(self, model: Any, stamp: Any, inputs: Mapping[str, Any], before: int | None) -> None:
        """Note what a forward is about to read: its arguments, and the tokens held `before` it.

        Raises:
            UnsupportedError: the cache was loaded for another model, or before this one changed.
        """
        if self.loaded:
            self.check_model(model, stamp)
        if self.unknown is not None:
            return
        if self._model is None:
            try:
                self._model, self.stamp = weakref.ref(model), stamp()
            except FAULTS as error:  # a module of a kind that nobody knows; the call goes on
                self.unknown = f"the model cannot be looked at: {reason(error)}"
                return
        self.unknown = self._obstacle(model, inputs, before)
        if self.unknown is None:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            real = None if mask is None or bool(mask.all()) else mask[:, -ids.shape[1] :].bool()
            # on the CPU, and not what the caller may write to
            self._parts.append((ids.to("cpu", copy=True), None if real is None else real.cpu()))
            self._padded |= real is not None
            self.first = self.first or ids.shape[1]
            self.length += ids.shape[1]

    def check_model(self, model: Any, stamp: Any) -> None:
        """Refuse a model that a loaded cache is not of; what it was when it was loaded, once.

        Raises:
            UnsupportedError: it is another one, or was changed since.
        """
        if self.model is not model or (not self._checked and self.stamp != stamp()):
            raise UnsupportedError(
                "the cache was loaded for another model, or the model was changed since: load it "
                "again with this one"
            )
        self._checked = True

    def __copy__(self) -> "TokensRead":
        twin = TokensRead()
        twin.__dict__.update(self.__dict__)
        twin._parts = list(self._parts)  # of tensors that nobody writes to
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokensRead":
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        unknown = self.unknown or "it was pickled"
        return {**self.__dict__, "_model": None, "stamp": None, "unknown": unknown}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens."""
        if self.length and tokens_to_remove:
            ids, real = self._joined()
            self.length = kept = max(0, self.length + int(tokens_to_remove))
            self._parts = [(ids[:, :kept], None if real is None else real[:, :kept])]

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was."""
        if self.length and self.unknown is None:
            ids, real = self._joined()
            index = index.cpu()
            self._parts = [(ids[index], None if real is None else real[index])]

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        if not self._parts:
            return torch.empty(0, 0, dtype=torch.int64), None
        if len(self._parts) > 1:
            ids = torch.cat([ids for ids, _ in self._parts], dim=1)
            whole = all(real is None for _, real in self._parts)
            reals = [
                torch.ones_like(i, dtype=torch.bool) if r is None else r for i, r in self._parts
            ]
            self._parts = [(ids, None if whole else torch.cat(reals, dim=1))]
        return self._parts[0]

    def _obstacle(self, model: Any, inputs: Mapping[str, Any], before: int | None) -> str | None:
        """Why the cache will not be of its tokens alone; None if it will."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if self.model is not model:
            return "two models have read into it"
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return "it was made of embeddings, not of input_ids [B, S]"
        if before is not None and before != self.length:
            return f"{before - self.length} tokens were read into it by other means"
        more = [n for n, value in inputs.items() if n not in _HARMLESS and _is_given(value)]
        if more:
            return f"its tokens were read with {', '.join(more)}"
        if self._parts and self._parts[0][0].shape[0] != ids.shape[0]:
            return "its batch has changed"
        end = self.length + ids.shape[1]
        padded = self._padded
        if mask is not None:
            if not isinstance(mask, Tensor) or tuple(mask.shape) != (ids.shape[0], end):
                return "its mask is not one of padding, [B, L]"
            if not bool(mask.all()):
                padded = True
                if self.length and not torch.equal(mask[:, : self.length].bool().cpu(), self.real):
                    return "its mask has changed"
        elif padded:
            return "it was read without the mask of its padding"
        return self._positions_obstacle(inputs, mask if padded else None, end)

    def _positions_obstacle(
        self, inputs: Mapping[str, Any], mask: Tensor | None, end: int
    ) -> str | None:
        positions, rows = inputs.get("position_ids"), end - self.length
        if positions is None:
            return None if mask is None else "its padding was read without position_ids"
        own = "it has positions of its own"
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            return own
        if mask is None:
            expected: Any = self.length
            if rows > 1:
                expected = torch.arange(self.length, end, device=positions.device)
            return None if bool((positions == expected).all()) else own
        real = mask[:, -rows:].bool()
        expected = (mask.long().cumsum(1) - 1)[:, -rows:]
        same = (positions == expected.to(positions.device)) | ~real.to(positions.device)
        return None if bool(same.all()) else own


class OwnCache(DynamicCache):
    """A cache of an attached model, whose layers are headwise's where they can be.

    `read` knows the tokens that it was made of, so that it can be saved, and used for those alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read = TokensRead()

    def check_whole(self) -> None:
        """Refuse a cache some of whose layers have read what others failed to hold.

        Raises:
            CapacityError: it is one, or may be.
        """
        failed = [layer for layer in self.layers if getattr(layer, "failed", False)]
        if not failed:
            return
        states = any(isinstance(layer, LinearAttentionLayer) for layer in self.layers)
        lengths = set[int]()
        if not states:  # they do not tell what they have read
            lengths = {layer.get_seq_length() for layer in self.layers}
        if len(lengths) == 1:  # it was the first layer: nothing was read
            self.read.crop(lengths.pop() - self.read.length)
            for layer in failed:
                layer.failed = False
        else:
            raise CapacityError(
                "an earlier call failed after some layers of the cache had read its tokens, as "
                "where one had no room for them: make a new one"
            )

    def save(self, path: str | Path) -> None:
        """Write it to a file: see `headwise.save_cache`."""
        from headwise.hf.stored import save_cache

        save_cache(self, path)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens."""
        super().crop(tokens_to_remove)
        self.read.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.read = TokensRead()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self.read.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for layer in self.layers:
            # stock layers of states have one of the two
            if hasattr(layer, "batch_repeat_interleave"):
                layer.batch_repeat_interleave(repeats)
            else:
                layer.reorder_cache(_sequences(layer).repeat_interleave(repeats))
        self.read.select(torch.arange(len(self.read.ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`: whatever can index the batch dimension."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            else:
                layer.reorder_cache(_sequences(layer)[indices])
        if self.read.length and self.read.unknown is None:
            self.read.select(torch.arange(len(self.read.ids))[torch.as_tensor(indices).cpu()])

    def __copy__(self) -> "OwnCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.read = copy.copy(self.read)
        return twin


def _sequences(layer: Any) -> Tensor:
    """The numbers of the sequences of a layer of states."""
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return torch.arange(next((len(state) for state in states if state is not None), 0))


def _is_given(value: Any) -> bool:
    return value is not None and value is not False
