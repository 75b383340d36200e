"""How an attached model comes to caches of ours: what stands where it would make its own."""

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.caches import CacheChoice
from headwise.hf.cache import use_own_layers
from headwise.hf.module_hook import ModuleHook
from headwise.hf.own_cache import CACHE_ARGUMENTS, OwnCache
from headwise.hf.sparse import SparseLayers
from headwise.hf.stock_names import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from headwise.hf.stored.identity import stamp_of

# The call of `generate` that runs in this thread, where it may begin with what is remembered.
REQUEST: ContextVar[Any] = ContextVar("REQUEST", default=None)


class PrepareCache(ModuleHook):
    """Stands in for a model's `_prepare_cache_for_generation`: stock's cache, with our layers."""

    def __init__(
        self, owner: PreTrainedModel, choice: CacheChoice, sparse: SparseLayers | None
    ) -> None:
        super().__init__(owner)
        self.choice, self.sparse = choice, sparse

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "choice": self.choice, "sparse": self.sparse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.choice, self.sparse = state["choice"], state["sparse"]

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        model = self.owner
        users = any(model_kwargs.get(name) is not None for name in CACHE_ARGUMENTS)
        stock = type(model)._prepare_cache_for_generation
        result = stock(model, generation_config, model_kwargs, *args)
        if not users and not torch.is_grad_enabled():
            for name in CACHE_ARGUMENTS:
                if isinstance(model_kwargs.get(name), Cache):
                    own = use_own_layers(model_kwargs[name], self.choice, self.sparse)
                    request = REQUEST.get()
                    if request is not None and request.is_for(model):
                        mode = args[0] if args else None
                        own = request.begin(model, own, model_kwargs, generation_config, mode)
                        model_kwargs[name] = own
                    if generation_config.is_assistant:  # stock said so to the layers that it made
                        own.activate_past_recording()
        return result


class ForwardCache:
    """Forward pre-hook: where the model would make a cache of its own, give it ours."""

    def __init__(
        self, model: PreTrainedModel, choice: CacheChoice, sparse: SparseLayers | None
    ) -> None:
        self.choice, self.sparse = choice, sparse
        names = parameters(model)
        self.argument = next((name for name in CACHE_ARGUMENTS if name in names), None)
        self.positions = {name: index for index, name in enumerate(names)}

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # appends in place would break gradients, and a compiler should see stock's own code
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        passed = [self._passed(name, args, kwargs) for name in CACHE_ARGUMENTS]
        if any(cache is not None for cache in passed):
            for given in passed:
                if isinstance(given, OwnCache):
                    self._note(model, given, args, kwargs)
            return None
        use_cache = self._passed("use_cache", args, kwargs)
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
        # a None under the other name beside ours is one argument twice
        others = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        own = use_own_layers(cache, self.choice, self.sparse)
        if isinstance(own, OwnCache):
            self._note(model, own, args, kwargs)
        return args, {**others, self.argument: own}

    def _note(
        self,
        model: PreTrainedModel,
        cache: OwnCache,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Have a cache know what is about to be read into it."""
        cache.check_whole()
        counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
        before = int(cache.get_seq_length()) if counts or not cache.layers else None
        inputs = dict(zip(self.positions, args, strict=False)) | kwargs
        cache.read.add(model, lambda: stamp_of(model), inputs, before)

    def _passed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.positions.get(name)
        if position is not None and position < len(args):
            return args[position]
        return kwargs.get(name)


def parameters(model: PreTrainedModel) -> list[str]:
    """What the model's forward takes, by name and in order."""
    return list(inspect.signature(type(model).forward).parameters)[1:]
