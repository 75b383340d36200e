"""Gated MLPs: what stands in for the `forward` of a module with gate_proj, up_proj and down_proj.

Most families of Transformers have one of these names, also beside experts; in a decoder layer that
a family's file describes it is part of the layer's operators.
"""

from typing import Any

from torch import Tensor, nn

from headwise.hf.module_hook import ClassHook, is_as_first, is_touched, reads, remember
from headwise.hf.packed import PackedLinear, weight_of
from headwise.hf.step.codes import ACTIVATIONS
from headwise.hf.step.compared import difference, trial_rows, tried
from headwise.hf.step.linear import is_stock
from headwise.hf.step.replaced import Replaced
from headwise.ops import are_few, faster, watched

_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
_NAMES = {*_WEIGHTS, "act_fn"}
# What its code may read: nothing else can change what it computes.
_READ = _NAMES | {"float", "to", "dtype"}


class GatedForward(ClassHook):
    """Stands in for the `forward` of a gated MLP: the class's own, but for few rows."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.activation = _activation(owner)
        remember(self.activation[0])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        remember(self.activation[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.owner
        plain = len(args) == 1 and not kwargs and type(args[0]) is Tensor and not watched()
        if (
            plain
            and self.is_same(module)
            and are_few(args[0])
            and not module.training
            and _is_plain(module)
        ):
            given = _given(module, args[0])
            run = faster("mlp", *given) if _activation(module) == self.activation else None
            if run is not None:
                return run(*given)
        return type(module).forward(module, *args, **kwargs)


def _is_plain(module: nn.Module) -> bool:
    """Whether its products and its activation are those of their classes, and nobody's between."""
    parts: dict[str, Any] = module._modules
    touched = nn.modules.module._has_any_global_hook() or any(map(is_touched, parts.values()))
    if touched or parts.keys() != _NAMES:
        return False
    kinds = {type(parts[name]) for name in _WEIGHTS}
    return is_as_first(type(parts["act_fn"])) and (
        kinds == {PackedLinear} or all(is_stock(parts[name], nn.Linear) for name in _WEIGHTS)
    )


def _activation(module: nn.Module) -> tuple[type, Any]:
    """The class of the activation, and the function that some of Transformers' hold."""
    activation: Any = module._modules["act_fn"]
    return type(activation), activation.__dict__.get("act")


def _given(module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    parts: dict[str, Any] = module._modules
    products = [parts[name] for name in _WEIGHTS]
    weights, biases = [weight_of(part) for part in products], [part.bias for part in products]
    return x, weights, biases, True, ACTIVATIONS[type(parts["act_fn"]).__name__]


def replaced_gated(model: nn.Module) -> Replaced:
    """The gated MLPs of Transformers' classes."""
    known: dict[Any, str | None] = {}
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        of_transformers = type(module).__module__.startswith("transformers.models.")
        plain = of_transformers and module._modules.keys() == _NAMES
        if plain and reads(type(module)) <= _READ:
            tensors = (*module.parameters(), *module.buffers())
            shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
            kind = (type(module), type(module.act_fn), shapes)
            reasons[name] = tried(module, kind, known, _difference)
    return Replaced("gated MLPs of up to 16 rows", "modules", reasons, GatedForward)


def _difference(module: Any) -> str | None:
    """How ours differs from the class's own forward, on its own weights; None if it does not."""
    if type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"no kernel has the activation {type(module.act_fn).__name__}"
    remember(type(module.act_fn))
    if not _is_plain(module):
        return "its weights are multiplied in their own way"
    gate = module.gate_proj
    packed = type(gate) is PackedLinear
    x = trial_rows(gate.in_features, gate.like.dtype if packed else gate.weight.dtype)
    given = _given(module, x)
    run = faster("mlp", *given)
    if run is None:
        return f"no kernel multiplies weights such as these in {x.dtype} here"
    return difference(run(*given), type(module).forward(module, x), packed)
