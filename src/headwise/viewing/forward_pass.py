"""A model run once while a capture observes it, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.base.progress import Progress, silent
from headwise.errors import OptionError, UnsupportedError
from headwise.generation.options import Sampling
from headwise.generation.recorder import generate
from headwise.hf import attach, detach
from headwise.hf.inner_model import inner_models, named_parts
from headwise.hf.observer import observing
from headwise.viewing.capture import Capture


@contextmanager
def attached(model: Any, sparse: str | None = None) -> Iterator[dict[str, Any]]:
    """While open, the model is attached and in evaluation mode; yields its cache and `sparse`.

    `sparse` is for a model that is not attached yet; one that is keeps its own.

    Raises:
        UnsupportedError: not a Transformers model, or one that headwise cannot attach to.
    """
    if not isinstance(model, PreTrainedModel):
        # what wraps it may do more than run it: add a prefix, say
        inside = named_parts(inner_models(model))
        raise UnsupportedError(
            f"view was given a {type(model).__name__}, expected a Transformers PreTrainedModel"
            + (f": give what it holds, its {inside}" if inside else "")
        )
    attachment, training = model.__dict__.get("_headwise"), model.training
    if attachment is not None and sparse is not None:
        raise OptionError(
            f"sparse is {sparse!r}, and the model is attached already: attach it with "
            "headwise.attach(model, sparse=...)"
        )
    if attachment is None:
        attach(model, sparse=sparse)
    model.eval()
    try:
        now = model._headwise
        sparse = "all" if now.sparse is None else str(now.sparse.choice)
        yield {"cache": str(now.choice), "cache_limit": now.choice.limit, "sparse": sparse}
    finally:
        model.train(training)
        if attachment is None:
            detach(model)


def run(
    model: Any,
    ids: list[int],
    new_tokens: int,
    capture: Capture,
    how: dict[str, Any],
    progress: Progress = silent,
    kinds: list[int] | None = None,
) -> tuple[list[int], int | None]:
    """Run an attached model over `ids`, and decode up to `new_tokens` greedily.

    how: the cache and the sparse attention, as `attached` gives them. kinds: the token types of a
    pair, for an encoder that has such.

    Returns the tokens that were decoded and read again, and the one that comes next; a model that
    predicts no token decodes none, and its next one is None.
    """
    if not predicts(model):
        progress("running the model", 0, 0)
        inputs = {"input_ids": torch.tensor([ids], device=model.device)}
        if kinds is not None:
            inputs["token_type_ids"] = torch.tensor([kinds], device=model.device)
        with torch.no_grad(), observing(capture):
            model(**inputs)
        return [], None
    # the token after the last one is decoded too: so the last one is read, and has a row
    sampling = Sampling(max_new_tokens=new_tokens + 1)
    reading = partial(progress, "running the model")
    with torch.random.fork_rng(devices=[]), observing(capture):
        result = generate(model, ids, sampling=sampling, on_prefill=reading, **how)
    if result.interrupted:
        raise KeyboardInterrupt
    return result.tokens[:-1], result.tokens[-1]


def predicts(model: Any) -> bool:
    """Whether the model writes text token after token."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder
