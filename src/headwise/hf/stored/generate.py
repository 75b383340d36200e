"""An attached model's `generate`: its own, from a cache of what is remembered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.hf.module_hook import ModuleHook
from headwise.hf.own_cache import CACHE_ARGUMENTS, OwnCache
from headwise.hf.stock_names import CACHE
from headwise.hf.stored.remembered import Remembered, has_fixed, points_of

# The ways of generating that begin with a pass over what the cache does not hold.
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_ASKED = ("output_hidden_states", "output_attentions", "output_scores", "output_logits")


class RememberingGenerate(ModuleHook):
    """`generate` of the model's class.

    A cache that it is given has to be of the tokens given. Where the model remembers, the cache
    that it makes begins with what is known of the tokens, and is stored when it is done.
    """

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        model = self.owner
        cache = next((kwargs[n] for n in CACHE_ARGUMENTS if kwargs.get(n) is not None), None)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(cache, OwnCache) and isinstance(ids, Tensor) and ids.ndim == 2:
            _check_tokens(cache, ids, kwargs.get("attention_mask"))
        remembered: Remembered | None = model._headwise.remembered
        if remembered is None:
            return type(model).generate(model, inputs, *args, **kwargs)
        obstacle = _obstacle(ids, cache, kwargs)
        remembered.begin(f"not used: {obstacle or 'the call made no cache that headwise holds'}")
        request = Request(remembered, ids, obstacle)
        model._headwise.request = request
        try:
            result = type(model).generate(model, inputs, *args, **kwargs)
        finally:
            model._headwise.request = None
        if request.cache is not None:
            remembered.keep(model, request.cache)
        return result


@dataclass
class Request:
    """A call of `generate` that may begin with what is remembered."""

    remembered: Remembered
    ids: Any
    obstacle: str | None
    cache: OwnCache | None = None

    def begin(
        self, model: Any, cache: Any, inputs: Mapping[str, Any], config: Any, mode: Any
    ) -> Any:
        """The cache to generate with, in the place of an empty one.

        inputs: the arguments of the model's forward, repeated for beams. config: the generation's.
        """
        obstacle = self.obstacle or _obstacle_of_config(config, mode)
        if not isinstance(cache, OwnCache):
            obstacle = f"the cache is a {type(cache).__name__}"
        if obstacle is not None:
            self.remembered.begin(f"not used: {obstacle}")
            return cache
        repeats = max(config.num_beams, config.num_return_sequences)
        mask = inputs.get("attention_mask")
        ids, mask = self.ids.to(model.device), None if mask is None else mask[::repeats]
        known, length = self.remembered.recall(model, ids, mask)
        cache = cache if known is None else known
        if has_fixed(model) and mask is None:
            _read_ahead(model, cache, ids, length, self.remembered)
        if repeats > 1 and cache.read.length:
            cache.batch_repeat_interleave(repeats)
        self.cache = cache
        return cache


def _read_ahead(
    model: Any, cache: OwnCache, ids: Tensor, begin: int, remembered: Remembered
) -> None:
    """Read a prompt up to its last token, in parts after which what layers keep is stored."""
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    for end in points_of(begin, ids.shape[1] - 1):
        positions = torch.arange(begin, end, device=ids.device).expand(len(ids), -1)
        inputs = model.prepare_inputs_for_generation(
            ids[:, :end],
            next_sequence_length=end - begin,
            is_first_iteration=not begin,
            **{CACHE: cache, "use_cache": True, "position_ids": positions, **options},
        )
        model(**inputs, return_dict=True)
        remembered.keep(model, cache)
        begin = end


def _obstacle(ids: Any, cache: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why a call cannot begin with what is remembered, as far as its arguments say."""
    if cache is not None:
        return "a cache was given"
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        return "no input_ids [B, S] were given"
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
    if ids.shape[1] <= length:
        raise ShapeError(
            f"input_ids have {ids.shape[1]} tokens, and the cache {length}: give all of the text, "
            "which begins with those of the cache, and at least one token more"
        )
    if len(held) != len(ids):
        raise ShapeError(
            f"input_ids have {len(ids)} sequences, and the cache {len(held)}: "
            "cache.batch_repeat_interleave repeats what it holds"
        )
    differ = ((ids[:, :length].cpu() != held) & read.real).nonzero()
    if len(differ):
        row, at = differ[0].tolist()
        raise ShapeError(
            f"token {at} of sequence {row} is {int(ids[row, at])} in input_ids and "
            f"{int(held[row, at])} in the cache: the cache is of another text"
        )
