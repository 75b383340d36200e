"""Norms: what stands in for the `forward` of RMSNorm and LayerNorm as Transformers writes them.

Its classes compute them by five or six operators of PyTorch; which of the variants a class is, is
found by a trial of one of its modules.
"""

import copy
import inspect
from typing import Any

from torch import Tensor, nn

from headwise.hf.module_hook import ClassHook, parameters_of, reads
from headwise.hf.step.codes import NORMS
from headwise.hf.step.compared import difference, trial_rows, tried
from headwise.hf.step.replaced import Replaced
from headwise.ops import faster

# What a norm's code may read: nothing else can change what it computes.
_READ = {"weight", "bias", "variance_epsilon", "eps", "with_scale", "_norm", "torch", "dtype"}
_READ |= {"float32", "float", "to", "type_as", "pow", "square", "mean", "rsqrt", "sqrt"}


class NormForward(ClassHook):
    """Stands in for the `forward` of a norm: the class's own, but for plain rows.

    variant: which of `NORMS` it is. The class and the names of its parameters are as at `attach`.
    """

    def __init__(self, owner: nn.Module, variant: int) -> None:
        super().__init__(owner)
        self.variant, self.names = variant, parameters_of(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.owner
        plain = self.is_same(module) and parameters_of(module) == self.names and _is_plain(module)
        if plain and len(args) == 1 and not kwargs:
            given = (args[0], self.variant, *_numbers(module))
            run = faster("norm", *given)
            if run is not None:
                return run(*given)
        return type(module).forward(module, *args, **kwargs)


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing of an instance says that it computes something else."""
    own = module.__dict__
    return (
        own.get("with_scale", True) is True
        and "_norm" not in own
        and type(own.get("variance_epsilon", own.get("eps"))) is float
    )


def _numbers(module: nn.Module) -> tuple[Tensor | None, Tensor | None, Any]:
    """Weight, bias and epsilon."""
    own, parameters = module.__dict__, module._parameters
    eps = own.get("variance_epsilon", own.get("eps"))
    return parameters.get("weight"), parameters.get("bias"), eps


def replaced_norms(model: nn.Module) -> Replaced:
    """The norms of Transformers' classes.

    nn.LayerNorm and nn.RMSNorm are one operator of PyTorch each, and are not among them; norms that
    a gate enters are part of linear attention.
    """
    known: dict[Any, str | None] = {}
    reasons: dict[str, str | None] = {}
    variants: dict[Any, int] = {}

    def trial(module: nn.Module) -> str | None:
        said: str | None = None
        for variant in NORMS.values():
            said = _difference(module, variant)
            if said is None:
                variants[_kind(module)] = variant
                break
        return said

    for name, module in model.named_modules():
        if _is_norm(module):
            reasons[name] = tried(module, _kind(module), known, trial)
    return Replaced(
        "norms", "modules", reasons, lambda norm: NormForward(norm, variants[_kind(norm)])
    )


def _is_norm(module: nn.Module) -> bool:
    kind = type(module)
    return (
        "Norm" in kind.__name__
        and kind.__module__.startswith("transformers.models.")
        and not isinstance(module, nn.LayerNorm)
        and len(inspect.signature(kind.forward).parameters) == 2
        and not module._modules
        and "weight" in module._parameters
        and set(module._parameters) <= {"weight", "bias"}
        and getattr(module.weight, "ndim", 0) == 1
        and _is_plain(module)
        and reads(kind) <= _READ
    )


def _kind(module: nn.Module) -> Any:
    weight, _, eps = _numbers(module)
    assert weight is not None
    return type(module), weight.dtype, weight.shape, eps, *parameters_of(module)


def _difference(module: nn.Module, variant: int) -> str | None:
    """How a norm of ours differs from one such as the module; None if it does not.

    In float32 and its dtype, with a weight of random numbers: its own may say nothing.
    """
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.copy_(0.5 + trial_rows(parameter.shape[0], parameter.dtype)[0])
    for each in (copy.deepcopy(twin).float(), twin):
        weight, bias, eps = _numbers(each)
        assert weight is not None
        x = trial_rows(weight.shape[0], weight.dtype)
        given = (x, variant, weight, bias, eps)
        run = faster("norm", *given)
        if run is None:
            return f"no kernel computes norms such as this in {weight.dtype} here"
        said = difference(run(*given), type(module).forward(each, x))
        if said is not None:
            return said
    return None
