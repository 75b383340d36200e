"""A prompt with which several sequences of a call begin is read once, not once for each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwise.hf.continued import read_part, reads_in_chunks
from headwise.hf.module_hook import ModuleHook
from headwise.hf.own_cache import OwnCache
from headwise.hf.stock_names import CACHE
from headwise.hf.stored.identity import touched

# Tokens that a call must save, for which the weights are read once more.
_LEAST_SAVED = 64
# Of what `generate` gives, what a prompt without padding is read with.
_PLAIN = {CACHE, "use_cache", "position_ids", "logits_to_keep"}


class SharedPrefill(ModuleHook):
    """Stands in for `_prefill`: beams and return sequences share the cache of their prompt.

    All of it but the last token is read for one of them, and the cache is repeated.
    """

    def __call__(
        self, ids: Tensor, config: Any, given: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model = self.owner
        repeats = max(config.num_beams or 1, config.num_return_sequences or 1)
        if repeats > 1 and _may_share(model, ids, config, given, repeats):
            read_part(model, given[CACHE], ids[::repeats], 0, ids.shape[1] - 1)
            given[CACHE].batch_repeat_interleave(repeats)
        return type(model)._prefill(model, ids, config, given, *args, **kwargs)


def _may_share(
    model: Any, ids: Tensor, config: Any, given: Mapping[str, Any], repeats: int
) -> bool:
    """Whether that gives the same, as far as is known, and less is computed."""
    cache, mask = given.get(CACHE), given.get("attention_mask")
    if not isinstance(cache, OwnCache) or cache.get_seq_length() or model._headwise.sparse:
        return False  # what reads few tokens would read the last of the prompt
    saved = (len(ids) - len(ids) // repeats) * (ids.shape[1] - 1)
    if saved < _LEAST_SAVED or len(ids) % repeats or (mask is not None and not mask.all()):
        return False
    asked = config.output_hidden_states or config.output_attentions or config.prefill_chunk_size
    others = {name for name, value in given.items() if value is not None} - _PLAIN
    own = "prepare_inputs_for_generation" in model.__dict__
    if asked or own or others - {"attention_mask"} or model.training or torch.is_grad_enabled():
        return False
    at = given.get("position_ids")
    if at is not None and not torch.equal(at, torch.arange(at.shape[-1]).to(at).expand_as(at)):
        return False
    same = ids.unflatten(0, (-1, repeats))
    return bool((same == same[:, :1]).all()) and reads_in_chunks(model) and touched(model) is None
