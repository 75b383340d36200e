"""A model that reads tokens and gives logits, each step as Transformers' `generate` makes it."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedError
from headwise.generation.chunks import chunk_size
from headwise.hf import cache_nbytes
from headwise.hf.continued import reads_in_chunks
from headwise.hf.rotation import forget_length
from headwise.hf.stock_names import CACHE


class Stepper:
    """A model with a cache of its own, that reads tokens and gives the next one's logits.

    A model's own `prepare_inputs_for_generation` decides what a step is given, so that one that
    reads its context again (Phi-3, where LongRoPE changes its factors) does so here too.

    Attributes:
        ids: [1, L], what has been read.
        cache: its keys and values; None before the first step.
    """

    def __init__(self, model: Any, cache: Any = None) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)
        parameters = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._has_positions = "position_ids" in parameters

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [1, S], S at least 1; the last token's logits [1, vocabulary].

        The first ids are a prompt, read as `chunk_size` says; those of a later call at once.

        Raises:
            UnsupportedError: a model that gives no cache, at the second step.
        """
        assert ids.shape[1] > 0
        size = (None if self.ids.shape[1] else chunk_size(self.model)) or ids.shape[1]
        if not self.ids.shape[1]:
            forget_length(self.model)
        for chunk in ids.split(size, dim=1):
            logits = self._step(chunk, **self._last)
        return logits[:, -1]

    def read_all(self, ids: Tensor, size: int) -> Iterator[Tensor]:
        """Read a text [1, S] from its beginning; the logits of each token, in parts [1, s, V].

        s is `size` or less where the model reads in chunks, S where it does not.
        """
        forget_length(self.model)
        for chunk in ids.split(size if reads_in_chunks(self.model) else ids.shape[1], dim=1):
            yield self._step(chunk)

    def cache_nbytes(self) -> int:
        """Bytes that the cache holds."""
        return cache_nbytes(self.cache)

    def _step(self, ids: Tensor, **options: int) -> Tensor:
        first = not self.ids.shape[1]
        if not first and self.cache is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} gives no cache to go on from, so that it cannot be "
                "read step by step; model.generate and headwise generate run it"
            )
        self.ids = torch.cat([self.ids, ids], dim=1)
        arguments: dict[str, Any] = {CACHE: self.cache, "use_cache": True, **options}
        if self._has_positions:
            # a family that counts in several dimensions has its own way
            arguments["position_ids"] = self.model._prepare_position_ids_for_generation(
                self.ids, {}
            )
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=ids.shape[1],
            is_first_iteration=first,
            **arguments,
        )
        output = self.model(**inputs, return_dict=True)
        self.cache = output.get(CACHE)
        logits: Tensor = output.logits
        return logits


def random_tokens(model: Any, count: int) -> Tensor:
    """Random tokens [1, count] of a model's vocabulary, the same ones each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
