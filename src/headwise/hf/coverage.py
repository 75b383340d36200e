"""What of a model headwise can run, and what stays with Transformers: found before any change."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from headwise.caches import CacheChoice
from headwise.errors import SpecError, UnsupportedError
from headwise.hf import eager, families
from headwise.hf.cache_hooks import parameters
from headwise.hf.indexers import Chooser, chooses_tokens, indexers
from headwise.hf.inner_model import OFF_THE_INTERFACE, has_source, takes_interface
from headwise.hf.latent_modules import latent_modules
from headwise.hf.linear import Kind, linear_modules
from headwise.hf.module_hook import NAME
from headwise.hf.own_cache import CACHE_ARGUMENTS
from headwise.hf.step import Replaced, replaced
from headwise.spec import FAMILIES, ModelSpec
from headwise.spec.config.decoder_layer import DecoderLayer

_RECURRENT = "a recurrent or linear attention"
# What of a layer does not attend, by Transformers' name of its kind: the part, and what it is.
_NOT_ATTENTION = {
    "linear_attention": ("", _RECURRENT),
    "conv": ("", "a short convolution"),
    "hybrid": (".recurrent", f"{_RECURRENT} with the cache of the layer"),
    "hybrid_sliding": (".recurrent", f"{_RECURRENT} with the cache of the layer"),
}


@dataclass(frozen=True, eq=False)
class Coverage:
    """What `attach` finds in a model.

    own: attention modules that are not on the interface, by name. indexers: what chooses tokens, by
    name: what replaces it, or why it stays with Transformers. sparse: modules that attend to
    chosen tokens and stay, since an indexer does. latents: MLA modules, by name, and why each
    expands its latents at every step (None: they are absorbed). linear: modules of linear
    attention, by name: their kind, or why one stays. step: what else of a step is replaced. parts:
    models in the model with a config of their own that cannot be attached, and why. left: names of
    all that stays with Transformers, and why. spec: None for a family without a reader.
    grows_cache: whether the model makes a `DynamicCache`, whose layers ours can replace.
    """

    model: PreTrainedModel
    own: dict[str, Any]
    indexers: dict[str, Chooser | str]
    sparse: dict[str, Any]
    latents: dict[str, str | None]
    linear: dict[str, Kind | str]
    step: tuple[Replaced, ...]
    parts: dict[str, str]
    left: dict[str, str]
    spec: ModelSpec | None
    grows_cache: bool


def cover(model: PreTrainedModel, choice: CacheChoice, *, step: str, strict: bool) -> Coverage:
    """Look through a model.

    Raises:
        UnsupportedError: nothing (with `strict`: not everything) can be attached, or the cache
            cannot be used.
        SpecError: the model's config contradicts itself.
    """
    own, choosers = families.off_interface(model), indexers(model)
    # a layer may attend to what the indexer of another chooses
    unlike = next((said for said in choosers.values() if isinstance(said, str)), None)
    sparse = {} if unlike is None else _sparse_modules(model)
    name = type(model).__name__
    linear = {} if own else linear_modules(model)
    if not own:
        states = any(isinstance(said, Kind) for said in linear.values())
        _require_interface(model, sparse, unlike, states=states)
    parts = {
        part: reason
        for part, module in _parts(model).items()
        if (reason := _obstacle(module)) is not None
    }
    left = _left_to_stock(model, own, dict.fromkeys(sparse, unlike), linear) | parts
    if own and model.config._attn_implementation == NAME:
        raise UnsupportedError(
            f'{name} was loaded with attn_implementation="{NAME}", which is not '
            "for its family: load it without, then attach it"
        )
    first = next((f"{part}: {reason}" for part, reason in left.items()), "")
    if own and len(left) == len(own):
        raise UnsupportedError(f"no attention of {name} can be replaced; {first}")
    if strict and left:
        raise UnsupportedError(
            f"strict=True, and {len(left)} layers of {name} would stay with Transformers; {first}"
        )
    cached = require_cache(model, choice)
    latents = latent_modules(model, sparse)
    more = replaced(model, _layer_form(model)) if step == "all" else ()
    return Coverage(model, own, choosers, sparse, latents, linear, more, parts, left, *cached)


def require_cache(model: PreTrainedModel, choice: CacheChoice) -> tuple[ModelSpec | None, bool]:
    """The model's spec, and whether it makes a `DynamicCache`.

    Raises:
        UnsupportedError: the model cannot use the cache.
        SpecError: its config contradicts itself.
    """
    spec = _spec(model)
    grows_cache = _grows_a_cache(model, spec)
    if choice != CacheChoice() and not grows_cache:
        raise UnsupportedError(
            f"cache={str(choice)!r}, and {type(model).__name__} has no cache that grows: leave it "
            "out"
        )
    if choice.make().gives == "part" and any(map(chooses_tokens, model.modules())):
        raise UnsupportedError(
            f"cache={str(choice)!r} drops tokens, and {type(model).__name__} has indexers, which "
            "choose among all: take another cache"
        )
    for layer in () if spec is None else spec.layers:
        if layer.attention is None:
            continue
        dims = layer.attention.cache_rows.dims
        if choice.declared.bits == 4 and any(dim % 2 for dim in dims):
            raise UnsupportedError(
                f"cache={str(choice)!r} packs two numbers per byte, and {type(model).__name__} "
                f"caches rows of {dims[0]} and {dims[1]}: expected even ones; take int8"
            )
    return spec, grows_cache


def _spec(model: PreTrainedModel) -> ModelSpec | None:
    """The model's spec; None for a family without a reader that runs on SDPA, and so on ours."""
    try:
        return ModelSpec.from_config(model.config)
    except SpecError:
        family = family_name(model)
        # a config that holds a known one under another name (ColPali) is of no known family
        known = model.config.model_type in FAMILIES or hasattr(model.config, "text_config")
        if known and family in FAMILIES:
            raise
        asked = not model._supports_sdpa and not families.off_interface(model)
        reason = eager.obstacle(model) if asked else None
        if reason is not None:
            raise UnsupportedError(
                f"{type(model).__name__} has no spec reader (model_type {family!r}) and no SDPA in "
                f"Transformers, and {reason}"
            ) from None
        return None


def _obstacle(part: PreTrainedModel) -> str | None:
    """Why a model in a model cannot be attached; None if it can."""
    if not takes_interface(type(part)):
        return OFF_THE_INTERFACE
    known = part._supports_sdpa or part.config.model_type in FAMILIES
    return None if known else eager.obstacle(part)


def _layer_form(model: PreTrainedModel) -> DecoderLayer | None:
    """How the decoder layers of the model's family are made, where its file says so."""
    family = FAMILIES.get(family_name(model))
    return None if family is None else family.layer


def family_name(model: PreTrainedModel) -> str:
    """The model_type of the part that decodes."""
    return str(model.config.get_text_config(decoder=True).model_type)


def _grows_a_cache(model: PreTrainedModel, spec: ModelSpec | None) -> bool:
    """Whether the model makes a `DynamicCache`, whose layers ours can replace."""
    takes_one = any(name in parameters(model) for name in CACHE_ARGUMENTS)
    if not takes_one and not model.can_generate():
        return False  # another head on a decoder, as BertForMaskedLM's
    if spec is not None:
        return any(layer.attention and layer.attention.cached for layer in spec.layers)
    # of a family without a reader only this is known, and some have caches of their own
    generates = model.can_generate() and model._supports_default_dynamic_cache()
    return generates and not _is_encoder(model)


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether a family with both kinds is run as an encoder: BERT's kin without `is_decoder`.

    The flag alone does not say it, as GPT-NeoX has it too: nothing in an encoder is causal either.
    """
    causal = (getattr(module, "is_causal", False) for module in model.modules())
    return getattr(model.config, "is_decoder", None) is False and not any(causal)


def _require_interface(
    model: PreTrainedModel, sparse: dict[str, Any], unlike: str | None, *, states: bool
) -> None:
    """states: whether layers of linear attention can be attached, whatever else there is."""
    name = type(model).__name__
    unread = _attention_without_source(model)
    if unread is not None:
        raise UnsupportedError(
            f"{name} has attention of its own, {unread}, whose source cannot be read, so that how "
            "it attends is not known: define it in a file"
        )
    models = [model, *_parts(model).values()]
    if not states and not any(takes_interface(type(each)) for each in models):
        raise UnsupportedError(
            f"{name} does not take its attention from Transformers' attention interface, so "
            "headwise cannot replace it"
        )
    config = model.config.get_text_config(decoder=True)
    # a module without a config cannot be given one that keeps it with Transformers
    unkept = [module for module in sparse.values() if not hasattr(module, "config")]
    if unkept or len(sparse) >= config.num_hidden_layers:
        raise UnsupportedError(
            f"{'' if unkept else 'every layer of '}{name} attends to the tokens that an indexer "
            f"chooses (sparse attention), which headwise does not do: {unlike}"
        )
    if config.output_attentions:
        raise UnsupportedError(
            "config.output_attentions=True works with eager attention only: pass "
            "output_attentions=True per call instead"
        )


def _parts(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The models in a model that have a config of their own."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config is not model.config
    }


def _attention_without_source(model: PreTrainedModel) -> str | None:
    """The name of a class of attention that is defined in no file, as in a notebook; or None."""
    for kind in {type(module) for module in model.modules()}:
        attends = "Attention" in kind.__name__ and not issubclass(kind, PreTrainedModel)
        if attends and not has_source(kind):
            return kind.__name__
    return None


def _sparse_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Attention to tokens that an indexer chooses: the module's own, or that of a layer before."""
    return {name: module for name, module in model.named_modules() if chooses_tokens(module)}


def _left_to_stock(
    model: PreTrainedModel,
    own: dict[str, Any],
    sparse: dict[str, str | None],
    linear: dict[str, Kind | str],
) -> dict[str, str]:
    """The attention that stays with Transformers beside whole parts, and why."""
    reasons = {name: families.forward_obstacle(module) for name, module in own.items()}
    for name, unlike in sparse.items():
        reasons[name] = (
            f"attends to the tokens that an indexer chooses (sparse attention): {unlike}"
        )
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    known = {
        getattr(model.get_submodule(name), "layer_idx", None): at for name, at in linear.items()
    }
    for index, kind in enumerate(kinds):
        said = known.get(index)
        if kind in _NOT_ATTENTION and not isinstance(said, Kind):
            part, what = _NOT_ATTENTION[kind]
            reasons[f"decoder.{index}{part}"] = said or f"{what}, which headwise does not run"
    return {name: reason for name, reason in reasons.items() if reason is not None}
