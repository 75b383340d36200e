"""What the operators take of one decoder layer: found at attach, looked at again at each call."""

from typing import Any

from torch import Tensor, nn

from headwise.hf.module_hook import ModuleHook
from headwise.spec.config.decoder_layer import DecoderLayer

# As csrc/kernels.h numbers them.
_NORMS = {"rms": 1, "rms plus one": 2, "layer": 3}
_ACTIVATIONS = {
    "SiLUActivation": 0,
    "SiLU": 0,
    "GELUActivation": 1,
    "GELUTanh": 2,
    "NewGELUActivation": 2,
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
_CAPTURING = "transformers.utils.output_capturing"


class LayerParts:
    """The modules of a layer by the names of its family's file, and the operators' arguments.

    before, after: the arguments of the two operators that are the same at every call. Everything
    that they were made of is a fact, and a fact that has changed makes them anew. Holds the layer's
    modules, not the layer, so that it is freed with its last user.
    """

    def __init__(self, layer: nn.Module, form: DecoderLayer) -> None:
        self.form = form
        # by the index of the parent (0: the layer), the name there
        self.modules: list[tuple[int, str, nn.Module, type]] = []
        attention, mlp = self._find(layer, 0, form.attention), self._find(layer, 0, form.mlp)
        self.attention = attention
        norms = (form.before_attention, form.after_attention, form.before_mlp, form.after_mlp)
        self.norms = [None if name is None else self._find(layer, 0, name) for name in norms]
        self.qkv = [self._find(attention, 1, name) for name in form.qkv]
        self.out = self._find(attention, 1, form.out)
        self.head_norms = [self._find(attention, 1, name) for name in form.head_norms or ()]
        named = [name for name in (form.gate, form.up, form.down) if name is not None]
        self.mlp = [self._find(mlp, 2, name) for name in dict.fromkeys(named)]
        activation = type(self._find(mlp, 2, form.activation)).__name__
        self.activation = _ACTIVATIONS.get(activation)
        self.dim = int(attention.head_dim)
        self.heads = self.out.in_features // self.dim
        rows = sum(module.out_features for module in self.qkv) // self.dim
        self.kv_heads = (rows - self.heads) // 2
        self.obstacle = None
        if self.activation is None:
            self.obstacle = f"no kernel has the activation {activation}"
        self._facts: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_facts": [], "tensors": [], "before": (), "after": ()}

    def _find(self, parent: Any, index: int, name: str) -> Any:
        module = parent._modules[name]
        self.modules.append((index, name, module, type(module)))
        return module

    def are_as_they_were(self, layer: nn.Module) -> bool:
        """Whether all modules are still there, and nothing of anybody's is between them."""
        for _, _, module, kind in self.modules:
            if type(module) is not kind or is_touched(module):
                return False
        for own, key, value in self._facts:
            if own.get(key) is not value:
                break
        else:
            if self._facts:
                return True
        known = [layer]
        for parent, name, module, _ in self.modules:
            if known[parent]._modules.get(name) is not module:
                return False
            known.append(module)
        self._read(layer)
        return True

    def _read(self, layer: nn.Module) -> None:
        """Make the arguments, and remember what of."""
        self._facts, self.tensors = [], []
        known, form = [layer], self.form
        for parent, name, module, _ in self.modules:
            self._facts.append((known[parent]._modules, name, module))
            known.append(module)
        first, *rest = self.norms
        kind = _NORMS[form.norm]
        head_eps = [self._eps(norm) for norm in self.head_norms] or [0.0]
        query_norm, key_norm = (self._tensors(m)[0] for m in self.head_norms or (None, None))
        qkv = [self._tensors(module) for module in self.qkv]
        self.before = (
            0 if first is None else kind,
            *self._tensors(first),
            self._eps(first),
            [weight for weight, _ in qkv],
            [bias for _, bias in qkv],
            self.heads,
            self.kv_heads,
            self.dim,
            kind if self.head_norms else 0,
            query_norm,
            key_norm,
            head_eps[0],
        )
        weights = [self._tensors(module) for module in (self.out, *self.mlp)]
        self.after = (
            [weight for weight, _ in weights],
            [bias for _, bias in weights],
            form.gate is not None,
            *(0 if norm is None else kind for norm in rest),
            [tensor for norm in rest for tensor in self._tensors(norm)],
            *map(self._eps, rest),
            self.activation,
            form.parallel,
            1.0 if form.scale is None else float(self._fact(layer, form.scale)),
        )
        self.rotates = form.rotates is None or bool(self._fact(self.attention, form.rotates))
        self.asks = {
            "scaling": self._fact(self.attention, "scaling"),
            "sliding_window": self._fact(self.attention, "sliding_window"),
            "softcap": form.softcap and self._fact(self.attention, form.softcap),
        }
        self.causal = self._fact(self.attention, "is_causal") is True
        if "sliding_window" not in self.attention.__dict__:
            self.asks["sliding_window"] = getattr(self.attention.config, "sliding_window", None)
        # as the native operator takes them: 0 for what is not used
        scale, window, softcap = self.asks.values()
        self.options = (float(scale), int(window or 0), float(softcap or 0.0))

    def _fact(self, module: nn.Module, name: str) -> Any:
        value = module.__dict__.get(name)
        self._facts.append((module.__dict__, name, value))
        return value

    def _eps(self, norm: nn.Module | None) -> float:
        """What a norm adds below its root."""
        if norm is None:
            return 0.0
        name = "variance_epsilon" if "variance_epsilon" in norm.__dict__ else "eps"
        return float(self._fact(norm, name))

    def _tensors(self, module: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a norm or a product; None for what is not there."""
        if module is None:
            return None, None
        parameters = module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        for name, tensor in (("weight", weight), ("bias", bias)):
            self._facts.append((parameters, name, tensor))
            self.tensors += [] if tensor is None else [tensor]
        return weight, bias


def is_touched(module: nn.Module) -> bool:
    """Whether a module has a forward that is not its class's or ours, or hooks.

    Transformers' own, which it leaves after it has captured outputs, do nothing until it captures
    again.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        if any(hook.__module__ != _CAPTURING for hook in hooks):
            return True
    forward = own.get("forward")
    return forward is not None and not isinstance(forward, ModuleHook)
