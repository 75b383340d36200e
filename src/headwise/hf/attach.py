"""`attach` and `detach`: put a Transformers model on headwise, and take it off again.

Everything that attaching leaves is on the model object itself (and the name in Transformers'
registry): the name in its configs, and a few kinds of instance attributes that pickle, copy and
vanish with `detach`.
"""

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from headwise.caches import CacheChoice
from headwise.errors import SpecError, UnsupportedError
from headwise.hf import latent, own_forward
from headwise.hf.cache import cache_name, use_own_layers
from headwise.hf.empty_rows import EAGER
from headwise.hf.inner_model import has_source, inner_model, refusal, takes_interface
from headwise.hf.owned import NAME, Owned, StockConfig
from headwise.hf.report import AttachReport, LayerReport, layer_report, left_to_stock
from headwise.spec import FAMILIES, ModelSpec

_CACHE_ARGUMENTS = ("cache", "past_key_values")


class _Before:
    """What the configs of attached models said: another model may share one, and come later."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[Any, str | None]] = {}

    def of(self, config: Any, now: str | None) -> str | None:
        """What a config said before our name, which it says `now`; else what it says."""
        known = self._said.get(id(config))
        if now == NAME:
            return known[1] if known is not None and known[0]() is config else now
        key = id(config)
        self._said[key] = weakref.ref(config, lambda _: self._said.pop(key, None)), now
        return now


_BEFORE = _Before()


@dataclass
class _Attachment:
    """What was there before, kept on the model; unpickling it imports headwise.hf.

    previous: every config and its implementation; none where forwards were replaced instead. kept:
    modules that stay with Transformers by a config of their own, and the one that they had. marked:
    modules with an attribute of ours, and its name; a part that was attached before has its own.
    """

    previous: list[tuple[Any, str | None]]
    kept: list[tuple[Any, Any]]
    marked: list[tuple[Any, str]]
    report: AttachReport
    choice: CacheChoice


class _PrepareCache(Owned):
    """Stands in for a model's `_prepare_cache_for_generation`: stock's cache, with our layers."""

    def __init__(self, owner: PreTrainedModel, choice: CacheChoice) -> None:
        super().__init__(owner)
        self.choice = choice

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "choice": self.choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.choice = state["choice"]

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        model = self.owner
        given = any(model_kwargs.get(name) is not None for name in _CACHE_ARGUMENTS)
        stock = type(model)._prepare_cache_for_generation
        result = stock(model, generation_config, model_kwargs, *args)
        if not given and not torch.is_grad_enabled():
            for name in _CACHE_ARGUMENTS:
                if isinstance(model_kwargs.get(name), Cache):
                    own = use_own_layers(model_kwargs[name], self.choice)
                    if generation_config.is_assistant:  # stock said so to the layers that it made
                        own.activate_past_recording()
        return result


class _ForwardCache:
    """Forward pre-hook: where the model would make a cache of its own, give it ours."""

    def __init__(self, model: PreTrainedModel, choice: CacheChoice) -> None:
        self.choice = choice
        parameters = _parameters(model)
        self.argument = next((name for name in _CACHE_ARGUMENTS if name in parameters), None)
        self.positions = {name: index for index, name in enumerate(parameters)}

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # appends in place would break gradients, and a compiler should see stock's own code
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if any(self._given(name, args, kwargs) is not None for name in _CACHE_ARGUMENTS):
            return None
        use_cache = self._given("use_cache", args, kwargs)
        config = model.config.get_text_config(decoder=True)
        if not (getattr(config, "use_cache", False) if use_cache is None else use_cache):
            return None
        # a decoder with cross-attention and no encoder of its own makes another kind of cache
        if not model.config.is_encoder_decoder and kwargs.get("encoder_hidden_states") is not None:
            return None
        if self.argument is None or len(args) > self.positions[self.argument]:
            return None
        cache: Cache = DynamicCache(config=config)
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
        return args, {**kwargs, self.argument: use_own_layers(cache, self.choice)}

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.positions.get(name)
        if position is not None and position < len(args):
            return args[position]
        return kwargs.get(name)


def attach(
    model: PreTrainedModel | Any, *, cache: str = "contiguous", strict: bool = False
) -> AttachReport:
    """Run a Transformers model's attention, and its cache, on headwise.

    Example:
        >>> import headwise, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=64,
        ...     intermediate_size=96,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> report = headwise.attach(model)
        >>> report.layers[0].spec.mechanism
        'GQA'
        >>> headwise.detach(model)

    Afterwards `model.generate(...)` and `model(...)` work as before, with the same results. A model
    that is attached already stays as it is, or takes another cache. Nothing of headwise is saved
    with the model.

    Args:
        model: any `PreTrainedModel` whose attention is on Transformers' attention interface, and
            Falcon and Bloom; or what holds one such model, which is then attached: a PEFT model,
            what torch.compile or DistributedDataParallel return, a pipeline, a module of yours.
        cache: what holds the tokens of the layers that see all of them: "contiguous"; "paged" or
            "paged:16", pages of 64 or 16 tokens, which beams share; "int8" or
            "int4", rounded; "window:2048" or "window:2048,sinks=4", the last 2048 tokens and the
            first 4 only. Layers with a sliding window hold what it reaches, whatever is chosen.
        strict: raise where some attention would be left to Transformers. Without it the rest is
            attached, and the report says what is left and why.

    Returns:
        Per layer: its spec, the backend that runs it, and why the others do not; prints as a table.

    Raises:
        UnsupportedError: not a Transformers model, nor what holds one; or one of whose attention
            nothing (with `strict`: not everything) can be replaced; or a cache that the model
            cannot use.
        OptionError: no such cache.
        SpecError: the model's config contradicts itself.
    """
    model = inner_model("attach", model)
    choice = CacheChoice.parse(cache)
    attachment = model.__dict__.get("_headwise")
    if attachment is not None:
        stays = not attachment.previous or model.config._attn_implementation == NAME
        if stays and attachment.choice == choice:
            report: AttachReport = attachment.report
            return report
        spec = _spec(model)
        _require_cache(model, spec, _grows_a_cache(model, spec), choice)
        detach(model)  # another attention was set since, or another cache is asked for
    own, sparse = own_forward.own_modules(model), _sparse_modules(model)
    if not own:
        _require_interface(model, sparse)
    left = _left_to_stock(model, own, sparse)
    if own and model.config._attn_implementation == NAME:
        raise UnsupportedError(
            f'{type(model).__name__} was loaded with attn_implementation="{NAME}", which is not '
            "for its family: load it without, then attach it"
        )
    first = f"{left[0].name}: {left[0].note}" if left else ""
    if own and len(left) == len(own):
        raise UnsupportedError(f"no attention of {type(model).__name__} can be replaced; {first}")
    if strict and left:
        raise UnsupportedError(
            f"strict=True, and {len(left)} layers of {type(model).__name__} would stay with "
            f"Transformers; {first}"
        )
    spec = _spec(model)
    grows_cache = _grows_a_cache(model, spec)
    _require_cache(model, spec, grows_cache, choice)
    report = _report(model, spec, grows_cache, own, left, choice)
    previous = [] if own else [(at, at._attn_implementation) for at in _configs(model)]
    marked: list[tuple[Any, str]] = []
    for module in own.values():
        if own_forward.obstacle(module) is None:
            own_forward.replace(module)
            marked.append((module, "forward"))
    kept = [(module, module.config) for module in sparse.values()]
    for module, config in kept:
        module.config = StockConfig(config, "sdpa" if model._supports_sdpa else "eager")
    if not own:
        # Transformers would not set it on a class of a notebook, whose file it cannot read
        model.config._attn_implementation_internal = NAME
        model.set_attn_implementation(NAME)  # on its parts
        stay = {id(part.config) for part in _parts(model).values() if _part_refusal(part)}
        for config, implementation in previous:
            if id(config) in stay:
                config._attn_implementation_internal = implementation
    averaging = {id(config) for config, was in previous if _BEFORE.of(config, was) == "eager"}
    for module in model.modules():
        # the attention function is given the module alone
        if id(module.__dict__.get("config")) in averaging and EAGER not in module.__dict__:
            setattr(module, EAGER, True)
            marked.append((module, EAGER))
    for module in _latent_modules(model):
        if latent.obstacle(module) is None and "expand_kv" not in module.__dict__:
            module.expand_kv = latent.LatentPassthrough(module)
            marked.append((module, "expand_kv"))
    model._headwise = _Attachment(previous, kept, marked, report, choice)
    if grows_cache:
        model._prepare_cache_for_generation = _PrepareCache(model, choice)
        model.register_forward_pre_hook(_ForwardCache(model, choice), with_kwargs=True)
    return report


def detach(model: PreTrainedModel | Any) -> None:
    """Undo `attach`: the model is as it was before. A model that is not attached stays as it is.

    Raises:
        UnsupportedError: not a Transformers model, nor what holds one.
    """
    model = inner_model("detach", model)
    attachment = model.__dict__.pop("_headwise", None)
    if attachment is None:
        return
    for config, implementation in attachment.previous:
        # a user may have set another one since
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = implementation
    model.__dict__.pop("_prepare_cache_for_generation", None)
    for module, config in attachment.kept:
        module.config = config
    for module, attribute in attachment.marked:
        # a user may have put something else there since
        if attribute == EAGER or isinstance(module.__dict__.get(attribute), Owned):
            module.__dict__.pop(attribute, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _ForwardCache):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _parameters(model: PreTrainedModel) -> list[str]:
    """What the model's forward takes, by name and in order."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct config in the model that names an attention implementation."""
    found: dict[int, Any] = {}
    for module in model.modules():
        pending = [module.config] if isinstance(module, PreTrainedModel) else []
        while pending:
            config = pending.pop()
            if id(config) not in found:
                found[id(config)] = config
                parts = (getattr(config, name, None) for name in config.sub_configs)
                pending.extend(part for part in parts if part is not None)
    return list(found.values())


def _require_interface(model: PreTrainedModel, sparse: dict[str, Any]) -> None:
    name = type(model).__name__
    unread = _attention_without_source(model)
    if unread is not None:
        raise UnsupportedError(
            f"{name} has attention of its own, {unread}, whose source cannot be read, so that how "
            "it attends is not known: define it in a file"
        )
    if not takes_interface(type(model)):
        raise UnsupportedError(
            f"{name} does not take its attention from Transformers' attention interface, so "
            "headwise cannot replace it"
        )
    config = model.config.get_text_config(decoder=True)
    if len(sparse) >= config.num_hidden_layers:
        raise UnsupportedError(
            f"every layer of {name} attends to the tokens that an indexer chooses (sparse "
            "attention), which headwise does not do"
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


def _part_refusal(part: PreTrainedModel) -> str | None:
    return refusal(type(part), part.config.model_type)


def _attention_without_source(model: PreTrainedModel) -> str | None:
    """The name of a class of attention that is defined in no file, as in a notebook; or None."""
    for kind in {type(module) for module in model.modules()}:
        attends = "Attention" in kind.__name__ and not issubclass(kind, PreTrainedModel)
        if attends and not has_source(kind):
            return kind.__name__
    return None


def _sparse_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Attention to tokens that an indexer chooses: the module's own, or that of a layer before."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "indexer", None) is not None or getattr(module, "skip_topk", False)
    }


def _left_to_stock(
    model: PreTrainedModel, own: dict[str, Any], sparse: dict[str, Any]
) -> list[LayerReport]:
    """The attention that stays with Transformers, and why."""
    reasons = {name: own_forward.obstacle(module) for name, module in own.items()}
    chosen = "attends to the tokens that an indexer chooses (sparse attention)"
    reasons |= dict.fromkeys(sparse, chosen)
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    for index, kind in enumerate(kinds):
        if kind == "linear_attention":
            reasons[f"decoder.{index}"] = "a recurrent or linear attention, which headwise has not"
    for name, module in _parts(model).items():
        reasons[name] = _part_refusal(module)
    return [left_to_stock(name, reason) for name, reason in reasons.items() if reason is not None]


def _spec(model: PreTrainedModel) -> ModelSpec | None:
    """The model's spec; None for a family without a reader that runs on SDPA, and so on ours."""
    try:
        return ModelSpec.from_config(model.config)
    except SpecError:
        family = _family(model)
        # a config that holds a known one under another name (ColPali) is of no known family
        known = model.config.model_type in FAMILIES or hasattr(model.config, "text_config")
        if known and family in FAMILIES:
            raise
        if not model._supports_sdpa:
            raise UnsupportedError(
                f"{type(model).__name__}: no spec reader for model_type {family!r}, and no SDPA in "
                "Transformers either, so that what its attention needs is not known"
            ) from None
        return None


def _family(model: PreTrainedModel) -> str:
    """The model_type of the part that decodes."""
    return str(model.config.get_text_config(decoder=True).model_type)


def _grows_a_cache(model: PreTrainedModel, spec: ModelSpec | None) -> bool:
    """Whether the model makes a `DynamicCache`, whose layers ours can replace."""
    takes_one = any(name in _parameters(model) for name in _CACHE_ARGUMENTS)
    if not takes_one and not model.can_generate():
        return False  # another head on a decoder, as BertForMaskedLM's
    if spec is not None:
        return any(at.attention and at.attention.cached for at in spec.layers)
    # of a family without a reader only this is known, and some have caches of their own
    generates = model.can_generate() and model._supports_default_dynamic_cache()
    return generates and not _is_encoder(model)


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether a family with both kinds is run as an encoder: BERT's kin without `is_decoder`.

    The flag alone does not say it, as GPT-NeoX has it too: nothing in an encoder is causal either.
    """
    causal = (getattr(module, "is_causal", False) for module in model.modules())
    return getattr(model.config, "is_decoder", None) is False and not any(causal)


def _require_cache(
    model: PreTrainedModel, spec: ModelSpec | None, grows_cache: bool, choice: CacheChoice
) -> None:
    if choice != CacheChoice() and not grows_cache:
        raise UnsupportedError(
            f"cache={str(choice)!r}, and {type(model).__name__} has no cache that grows: leave it "
            "out"
        )
    specs = [] if spec is None else [at.attention for at in spec.layers if at.attention]
    for at in specs:
        dims = at.cache_rows.dims
        if choice.declared.bits == 4 and any(dim % 2 for dim in dims):
            raise UnsupportedError(
                f"cache={str(choice)!r} packs two numbers per byte, and {type(model).__name__} "
                f"caches rows of {dims[0]} and {dims[1]}: expected even ones; take int8"
            )


def _latent_modules(model: PreTrainedModel) -> list[Any]:
    family = FAMILIES.get(_family(model))
    if family is None or not family.passes_latents:
        return []
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def _report(
    model: PreTrainedModel,
    spec: ModelSpec | None,
    grows_cache: bool,
    own: dict[str, Any],
    left: list[LayerReport],
    choice: CacheChoice,
) -> AttachReport:
    dtype, device = model.dtype, model.device.type
    caches = _caches(model, choice) if grows_cache else ()
    if spec is None:
        family = model.config.model_type
        note = f"no spec reader for {family!r}: what each call needs is read from its arguments"
        return AttachReport(
            type(model).__name__,
            (layer_report("all", None, dtype, device, note, False, _joined(caches)), *left),
            choice.words if grows_cache else "none of ours",
        )
    obstacles = {latent.obstacle(module) for module in _latent_modules(model)}
    reasons = sorted(reason for reason in obstacles if reason is not None)
    note = f"the latents are expanded at every step: {reasons[0]}" if reasons else ""
    absorbs = bool(obstacles) and not reasons
    if own:
        note = own_forward.cache_note(next(iter(own.values())), dtype)
    stay = {at.name for at in left}
    skipped = {index for index, name in enumerate(own) if name in stay}
    layers = []
    groups = (("encoder", spec.encoder_layers), ("decoder", spec.layers))
    for stack, specs in groups:
        for at in specs:
            name = f"{stack}.{at.index}"
            own_layer = at.attention is not None and at.attention.indexer is None
            if own_layer and at.index not in skipped:
                cache = "none"
                if stack == "decoder" and caches:
                    cache = caches[min(at.index, len(caches) - 1)]
                layers.append(layer_report(name, at.attention, dtype, device, note, absorbs, cache))
            if at.cross_attention is not None:
                layers.append(
                    layer_report(f"{name}.cross", at.cross_attention, dtype, device, "", False)
                )
    words = "none of ours" if spec.layers else "none (an encoder)"
    cache = choice.words if caches else words
    if any(name != str(choice) for name in caches):
        cache += "; in sliding layers what the window reaches"
    return AttachReport(type(model).__name__, (*layers, *left), cache)


def _caches(model: PreTrainedModel, choice: CacheChoice) -> tuple[str, ...]:
    """What each layer of a fresh cache is held in; one for all where Transformers makes them late.

    A kind of layer that is not ours (a recurrent state) counts as none.
    """
    cache = use_own_layers(DynamicCache(config=model.config.get_text_config(decoder=True)), choice)
    return tuple(cache_name(layer) for layer in cache.layers) or (str(choice),)


def _joined(names: tuple[str, ...]) -> str:
    return "; ".join(dict.fromkeys(names)) or "none"
