"""What `attach` needs to know of ranks: whether a model's contexts can be spread, and the hooks."""

from typing import Any, NoReturn

from transformers import PreTrainedModel

from headwise.caches import CacheChoice
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.cache import use_own_layers
from headwise.hf.coverage import Coverage
from headwise.hf.parallel.alike import SameInputs, SameLogits, require_same_model
from headwise.hf.parallel.layer import SplitLayer
from headwise.hf.parallel.ranks import Ranks, SplitChoice
from headwise.hf.stock_names import DynamicCache


def split_choice(
    model: PreTrainedModel, choice: CacheChoice, given: Any, asked: str, **others: Any
) -> SplitChoice:
    """The cache spread over the ranks that are given, which all attach the same model alike.

    asked: what else `attach` is asked for. others: options that do not go with it.

    Raises:
        OptionError: no ranks, or one of the others is given.
        UnsupportedError: weights that are spread over processes already.
        RankError: one has another model, or asks for something else.
    """
    beside = next((name for name, value in others.items() if value), None)
    if beside is not None:
        raise OptionError(f"{beside} needs a whole context: leave it or context_parallel out")
    split = SplitChoice.over(choice, Ranks.of(given))
    spread = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if spread or (getattr(model, "tp_size", None) or 1) > 1:
        _refuse(model, "has weights that are spread over processes already (tensor parallelism)")
    require_same_model(model, f"{asked}, cache={choice}", split.ranks)
    return split


def require_split(coverage: Coverage, choice: SplitChoice) -> None:
    """Check that ranks can share the contexts of this model.

    Raises:
        UnsupportedError: they cannot.
    """
    obstacle = _obstacle(coverage, choice)
    if obstacle is not None:
        _refuse(coverage.model, obstacle)


def _refuse(model: PreTrainedModel, obstacle: str) -> NoReturn:
    raise UnsupportedError(f"context_parallel, and {type(model).__name__} {obstacle}: leave it out")


def _obstacle(coverage: Coverage, choice: SplitChoice) -> str | None:
    model = coverage.model
    if model.config.is_encoder_decoder:
        return "has an encoder, whose tokens are not spread"
    if coverage.own:
        return "has attention that is not on Transformers' attention interface"
    if coverage.indexers:
        return "has indexers, which choose among all tokens"
    if not coverage.grows_cache:
        return "has no cache that grows"
    config = model.config.get_text_config(decoder=True)
    cache = use_own_layers(DynamicCache(config=config), choice)
    if cache.layers and not any(isinstance(layer, SplitLayer) for layer in cache.layers):
        return "has no layer that holds every token"
    return None


def put_hooks(model: PreTrainedModel, choice: SplitChoice) -> None:
    """Have the model compare its inputs, and take its logits from the first rank."""
    model.register_forward_pre_hook(SameInputs(model, choice.ranks), with_kwargs=True)
    model.register_forward_hook(SameLogits(choice.ranks))


def take_hooks(model: PreTrainedModel) -> None:
    """Undo `put_hooks`, where that was done."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, SameInputs | SameLogits):
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
