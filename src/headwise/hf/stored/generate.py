"""An attached model's `generate`: its own, from a cache of what is remembered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.hf.cache_hooks import REQUEST
from headwise.hf.continued import read_part
from headwise.hf.module_hook import ModuleHook
from headwise.hf.own_cache import CACHE_ARGUMENTS, OwnCache
from headwise.hf.stored.remembered import Remembered, has_fixed, points_of

# The ways of generating that begin with a pass over what the cache does not hold.
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_ASKED = ("output_hidden_states", "output_attentions", "output_scores", "output_logits")


class CheckedInputs(ModuleHook):
    """Stands in for `_prepare_model_inputs`: a cache that `generate` is given is of its tokens."""

    def __call__(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        model = self.owner
        stock = type(model)._prepare_model_inputs(model, inputs, bos_token_id, model_kwargs)
        ids, name, given = stock
        cache = next((given[n] for n in CACHE_ARGUMENTS if given.get(n) is not None), None)
        if isinstance(cache, OwnCache) and name == "input_ids" and ids.ndim == 2:
            _check_tokens(cache, ids, given.get("attention_mask"))
        return stock


class RememberingGenerate(ModuleHook):
    """`generate` of a model that remembers.

    The cache that it makes begins with what is known of the tokens, and is stored when it is done.
    It keeps its model alive, as a bound method does: `load(...)[0].generate(...)` has no other.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self._kept = owner

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept = state["owner"]

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        model = self.owner
        cache = next((kwargs[n] for n in CACHE_ARGUMENTS if kwargs.get(n) is not None), None)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        remembered: Remembered = model._headwise.remembered
        obstacle = _obstacle(ids, cache, kwargs)
        remembered.begin(f"not used: {obstacle or 'the call made no cache that headwise holds'}")
        request = Request(model, remembered, ids, obstacle)
        before = REQUEST.set(request)
        try:
            result = type(model).generate(model, inputs, *args, **kwargs)
        finally:
            REQUEST.reset(before)
        if request.cache is not None:
            remembered.keep(model, request.cache)
        return result


@dataclass
class Request:
    """A call of `generate` that may begin with what is remembered."""

    model: Any
    remembered: Remembered
    ids: Any
    obstacle: str | None
    cache: OwnCache | None = None
    begun: bool = False

    def is_for(self, model: Any) -> bool:
        """Whether it is this model's, and not that of a call inside it."""
        return self.model is model and not self.begun

    def begin(
        self, model: Any, cache: Any, inputs: Mapping[str, Any], config: Any, mode: Any
    ) -> Any:
        """The cache to generate with, in the place of an empty one.

        inputs: the arguments of the model's forward, repeated for beams. config: the generation's.
        """
        self.begun = True
        obstacle = self.obstacle or _obstacle_of_config(config, mode)
        if not isinstance(cache, OwnCache):
            obstacle = f"the cache is a {type(cache).__name__}"
        elif all(cache.is_linear):
            obstacle = "Transformers' generate reads the whole prompt into states: use recall"
        if obstacle is not None:
            self.remembered.begin(f"not used: {obstacle}")
            return cache
        repeats = max(config.num_beams, config.num_return_sequences)
        mask = inputs.get("attention_mask")
        ids = self.ids.to(model.device)
        # of a mask that hides nothing Transformers before 5.24 does not let go
        mask = None if mask is None or bool(mask.all()) else mask[::repeats]
        known, length, usable = self.remembered.recall(model, ids, mask)
        cache = cache if known is None else known
        if usable and mask is None and has_fixed(model):
            _read_ahead(model, cache, ids, length, self.remembered)
        if repeats > 1 and cache.read.length:
            cache.batch_repeat_interleave(repeats)
        self.cache = cache
        return cache


def _read_ahead(
    model: Any, cache: OwnCache, ids: Tensor, begin: int, remembered: Remembered
) -> None:
    """Read a prompt up to its last token, in parts after which what layers keep is stored."""
    for end in points_of(begin, ids.shape[1] - 1):
        read_part(model, cache, ids, begin, end)
        remembered.keep(model, cache)
        begin = end


def _obstacle(ids: Any, cache: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why a call cannot begin with what is remembered, as far as its arguments say."""
    if cache is not None:
        return "a cache was given"
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        return "no input_ids [B, S] were given"
    if kwargs.get("custom_generate") is not None:
        return "custom_generate reads the prompt itself"
    more = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and name not in ("inputs", "input_ids", "attention_mask")
    ]
    return f"{', '.join(more)} were given" if more else None


def _obstacle_of_config(config: Any, mode: Any) -> str | None:
    asked = [name for name in _ASKED if getattr(config, name, None)]
    if asked:
        return f"{', '.join(asked)} would lack what was not computed"
    if config.token_healing:
        return "token_healing changes the prompt"
    name = str(getattr(mode, "value", mode))
    return None if name in _MODES else f"{name.replace('_', ' ')} reads the whole prompt"


def _check_tokens(cache: OwnCache, ids: Tensor, mask: Any) -> None:
    """Refuse ids [B, L] that do not begin with what the cache has read.

    With a mask longer than them they are new ones alone, as in Transformers.

    Raises:
        ShapeError: says where they differ.
    """
    read = cache.read
    held, length = read.ids, read.length
    whole = not isinstance(mask, Tensor) or mask.shape[-1] == ids.shape[1]
    if read.unknown is not None or not length or not whole:
        return
    if all(cache.is_linear):
        if torch.equal(ids[:, :length].cpu(), held):
            raise ShapeError(
                f"input_ids begin with the {length} tokens of the cache, and generate reads all of "
                "them into a cache of states alone: give those that come after them"
            )
        return
    if ids.shape[1] <= length:
        raise ShapeError(
            f"input_ids have {ids.shape[1]} tokens, and the cache {length}: give all of the text, "
            "which begins with those of the cache, and at least one token more"
        )
    if len(held) % len(ids):
        raise ShapeError(
            f"input_ids have {len(ids)} sequences, and the cache {len(held)}: "
            "cache.batch_repeat_interleave repeats what it holds"
        )
    # for beams and return sequences a cache is repeated, and its tokens are not yet
    ids = ids.repeat_interleave(len(held) // len(ids), dim=0)
    differ = ((ids[:, :length].cpu() != held) & read.real).nonzero()
    if len(differ):
        row, at = differ[0].tolist()
        raise ShapeError(
            f"token {at} of sequence {row} is {int(ids[row, at])} in input_ids and "
            f"{int(held[row, at])} in the cache: the cache is of another text"
        )
