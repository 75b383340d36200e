"""`recall` and `remember`: what a model remembers, for a plain forward."""

from typing import Any

from torch import Tensor

from headwise.errors import ShapeError, UnsupportedError
from headwise.hf.cache import use_own_layers
from headwise.hf.inner_model import inner_model
from headwise.hf.own_cache import OwnCache
from headwise.hf.stock_names import DynamicCache
from headwise.hf.stored.remembered import Remembered


def recall(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[OwnCache, int]:
    """A cache of the longest beginning of `ids` that the model remembers, and how long that is.

    A forward that is given the cache reads, and gives the logits of, the rest alone:

        cache, n = headwise.recall(model, ids)
        logits = model(ids[:, n:], cache=cache, use_cache=True).logits

    Args:
        model: attached with `remember`.
        ids: [B, S] tokens. The last one is never recalled: its logits are to be computed.
        attention_mask: [B, S], 0 on padding, which is on the left.

    Returns:
        The cache, an empty one where nothing is known, and the tokens that it has read, padding
        included, 0 to S - 1. `attach`'s report says why nothing could be used.

    Raises:
        UnsupportedError: the model does not remember.
        ShapeError: ids that are not [B, S], or a mask of another shape.
    """
    inner, remembered = _remembered("recall", model)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(f"ids are {shape}, expected a tensor [B, S] of at least one token")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ShapeError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected that of ids "
            f"{list(ids.shape)}"
        )
    cache, length, _ = remembered.recall(inner, ids, attention_mask)
    if cache is None:
        config = inner.config.get_text_config(decoder=True)
        held = inner._headwise
        cache = use_own_layers(DynamicCache(config=config), held.choice, held.sparse)
    assert isinstance(cache, OwnCache)
    return cache, length


def remember(model: Any, cache: Any) -> int:
    """Store what a cache has read in the folder of the model; how many tokens were new.

    `generate` does so by itself; this is for a plain forward.

    Raises:
        UnsupportedError: the model does not remember, or it is not known what the cache is of.
    """
    inner, remembered = _remembered("remember", model)
    if not isinstance(cache, OwnCache):
        raise UnsupportedError(
            f"cache is a {type(cache).__name__}, expected one that a model made after "
            "headwise.attach(model)"
        )
    remembered.begin()
    remembered.keep(inner, cache)
    if remembered.notes:
        raise UnsupportedError(remembered.notes[-1])
    return remembered.stored


def _remembered(what: str, model: Any) -> tuple[Any, Remembered]:
    inner = inner_model(what, model)
    attachment = inner.__dict__.get("_headwise")
    if attachment is None or attachment.remembered is None:
        raise UnsupportedError(
            f"{type(inner).__name__} does not remember: call headwise.attach(model, "
            "remember=FOLDER) first"
        )
    return inner, attachment.remembered
