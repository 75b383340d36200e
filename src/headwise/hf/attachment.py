"""What `attach` leaves on a model, put on and taken off again."""

import weakref
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from headwise.caches import CacheChoice
from headwise.hf import families
from headwise.hf.cache_hooks import ForwardCache, PrepareCache
from headwise.hf.coverage import Coverage
from headwise.hf.empty_rows import EAGER
from headwise.hf.indexers import MASK_BUILDER, hands_a_mask
from headwise.hf.indexers.pooled import ChoiceAsMask
from headwise.hf.latent import LatentPassthrough
from headwise.hf.linear import Kind, LinearModule
from headwise.hf.module_hook import ATTACHED, NAME, ModuleHook, StockConfig
from headwise.hf.packed import Packing
from headwise.hf.parallel.attached import put_hooks, take_hooks
from headwise.hf.parallel.ranks import SplitChoice
from headwise.hf.report import AttachReport
from headwise.hf.shared_prompt import SharedPrefill
from headwise.hf.sparse import SparseLayers
from headwise.hf.stored.generate import CheckedInputs, RememberingGenerate
from headwise.hf.stored.identity import Identity
from headwise.hf.stored.remembered import Remembered


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
class Attachment:
    """What was there before, kept on the model; unpickling it imports headwise.hf.

    previous: every config and its implementation; none where forwards were replaced instead. kept:
    modules that stay with Transformers by a config of their own, and the one that they had. marked:
    modules with an attribute of ours, and its name; a part that was attached before has its own.
    sparse: which layers choose their keys, where any do. packing: how the weights were packed,
    where they were. identity: hashes of the model, once they were asked for. remembered: what it
    has read before. continues: what is wrong with reading a text in two parts, "" for nothing, once
    that was tried.
    """

    previous: list[tuple[Any, str | None]]
    kept: list[tuple[Any, Any]]
    marked: list[tuple[weakref.ref[Any], str]]
    report: AttachReport
    choice: CacheChoice
    step: str
    sparse: SparseLayers | None = None
    packing: Packing | None = None
    identity: Identity | None = None
    remembered: Remembered | None = None
    continues: str | None = None

    def mark(self, module: Any, name: str) -> None:
        """Remember an attribute that was put on a module, which the model may drop."""
        self.marked.append((weakref.ref(module), name))

    def marks(self) -> list[tuple[Any, str]]:
        """Those that are left."""
        alive = ((module(), name) for module, name in self.marked)
        return [(module, name) for module, name in alive if module is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "marked": self.marks()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.marked = [(weakref.ref(module), name) for module, name in state["marked"]]


def put_on(
    coverage: Coverage,
    report: AttachReport,
    choice: CacheChoice,
    step: str,
    sparse: SparseLayers | None,
    packing: Packing | None,
    remembered: Remembered | None,
) -> None:
    """Attach all that the coverage says can be."""
    model = coverage.model
    previous = [
        (config, config._attn_implementation)
        for config in ([] if coverage.own else _configs(model))
    ]
    kept = [(module, module.config) for module in coverage.sparse.values()]
    attachment = Attachment(
        previous, kept, [], report, choice, step, sparse, packing, remembered=remembered
    )
    for module, config in kept:
        module.config = StockConfig(config, "sdpa" if model._supports_sdpa else "eager")
    for module in coverage.own.values():
        if families.forward_obstacle(module) is None:
            families.replace_forward(module)
            attachment.mark(module, "forward")
    for kind in coverage.step:
        for name, obstacle in kind.reasons.items():
            if obstacle is None:
                replaced: Any = model.get_submodule(name)
                replaced.forward = kind.forward(replaced)
                attachment.mark(replaced, "forward")
    for name, attention in coverage.linear.items():
        if isinstance(attention, Kind):
            linear: Any = model.get_submodule(name)
            linear.forward = LinearModule(linear, attention)
            attachment.mark(linear, "forward")
    if not coverage.sparse:
        _replace_indexers(coverage, attachment)
    if not coverage.own:
        _name_configs(coverage, previous)
    _mark_eager(model, attachment)
    for name, obstacle in coverage.latents.items():
        if obstacle is None:
            expanding: Any = model.get_submodule(name)
            expanding.expand_kv = LatentPassthrough(expanding)
            attachment.mark(expanding, "expand_kv")
    model._headwise = attachment
    if coverage.grows_cache:
        model._prepare_cache_for_generation = PrepareCache(model, choice, sparse)
        model.register_forward_pre_hook(ForwardCache(model, choice, sparse), with_kwargs=True)
        for name, hook in (("_prepare_model_inputs", CheckedInputs), ("_prefill", SharedPrefill)):
            if name not in model.__dict__:  # else it is somebody's own
                setattr(model, name, hook(model))
                attachment.mark(model, name)
    if isinstance(choice, SplitChoice):
        put_hooks(model, choice)
    set_remembered(model, remembered)


def set_remembered(model: PreTrainedModel, remembered: Remembered | None) -> None:
    """Have an attached model remember there, or nowhere."""
    attachment: Any = model._headwise
    attachment.remembered = remembered
    attachment.report = replace(attachment.report, remembered=remembered)
    if isinstance(model.__dict__.get("generate"), RememberingGenerate):
        del model.generate
    if remembered is not None and "_prepare_cache_for_generation" in model.__dict__:
        model.generate = RememberingGenerate(model)
    elif remembered is not None:
        remembered.begin("not used: the model makes no cache that headwise holds")


def _replace_indexers(coverage: Coverage, attachment: Attachment) -> None:
    model = coverage.model
    for name, chooser in coverage.indexers.items():
        assert not isinstance(chooser, str)
        indexer: Any = model.get_submodule(name)
        indexer.forward = chooser(indexer)
        attachment.mark(indexer, "forward")
    for module in filter(hands_a_mask, model.modules()):
        attending: Any = module
        setattr(attending, MASK_BUILDER, ChoiceAsMask(attending))
        attachment.mark(attending, MASK_BUILDER)


def take_off(model: PreTrainedModel, attachment: Attachment) -> None:
    """Leave the model as it was before."""
    for config, implementation in attachment.previous:
        # a user may have set another one since
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = implementation
    model.__dict__.pop("_prepare_cache_for_generation", None)
    if isinstance(model.__dict__.get("generate"), RememberingGenerate):
        del model.generate
    for module, config in attachment.kept:
        module.config = config
    for module, attribute in attachment.marks():
        # a user may have put something else there since
        if attribute == EAGER or isinstance(module.__dict__.get(attribute), ModuleHook):
            module.__dict__.pop(attribute, None)
        # accelerate's hooks keep what was there before them, and put it back
        if isinstance(module.__dict__.get("_old_forward"), ModuleHook):
            module._old_forward = MethodType(type(module).forward, module)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ForwardCache):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    take_hooks(model)


def _name_configs(coverage: Coverage, previous: list[tuple[Any, str | None]]) -> None:
    """Put our name into every config but those of parts that cannot be attached."""
    stay = {id(coverage.model.get_submodule(name).config) for name in coverage.parts}
    for config, _ in previous:
        if id(config) not in stay:
            # past Transformers' setter, which looks for the class's file and logs what it refuses
            config._attn_implementation_internal = ATTACHED


def _mark_eager(model: PreTrainedModel, attachment: Attachment) -> None:
    """Mark the modules whose config said eager: the attention function is given these alone."""
    averaging = {
        id(config) for config, was in attachment.previous if _BEFORE.of(config, was) == "eager"
    }
    for module in model.modules():
        if id(module.__dict__.get("config")) in averaging and EAGER not in module.__dict__:
            setattr(module, EAGER, True)
            attachment.mark(module, EAGER)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct config in the model that names an attention implementation."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        pending = [module.config] if isinstance(module, PreTrainedModel) else []
        while pending:
            config = pending.pop()
            if id(config) not in configs:
                configs[id(config)] = config
                parts = (getattr(config, name, None) for name in config.sub_configs)
                pending.extend(part for part in parts if part is not None)
    return list(configs.values())
