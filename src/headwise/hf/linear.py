"""Products of few rows: what stands in for the `forward` of nn.Linear and of Conv1D, as GPT-2 has.

A decoding step spends most of its time in them: each reads its whole weight for a row or a few.
"""

from typing import Any

from torch import Tensor, nn

from headwise.hf.module_hook import ModuleHook
from headwise.hf.stock_names import Conv1D
from headwise.ops import faster


class LinearForward(ModuleHook):
    """Stands in for the `forward` of an nn.Linear: the class's own, but for few rows."""

    def __call__(self, input: Tensor) -> Tensor:
        """[...,E] to [...,F]."""
        module = self.owner
        weights = (module.weight,)
        run = faster("linear", input, weights)
        if run is None:
            stock: Tensor = type(module).forward(module, input)
            return stock
        result: Tensor = run(input, weights, (module.bias,))[0]
        return result


class Conv1dForward(ModuleHook):
    """Stands in for the `forward` of a Conv1D, whose weight [E,F] is stored transposed."""

    def __call__(self, x: Tensor) -> Tensor:
        """[...,E] to [...,F]."""
        module = self.owner
        weights = (module.weight.t(),)
        run = faster("linear", x, weights)
        if run is None:
            stock: Tensor = type(module).forward(module, x)
            return stock
        result: Tensor = run(x, weights, (module.bias,))[0]
        return result


_FORWARDS: dict[type[nn.Module], type[ModuleHook]] = {
    nn.Linear: LinearForward,
    Conv1D: Conv1dForward,
}


def linear_modules(model: nn.Module) -> dict[str, str | None]:
    """The modules that multiply by a weight, by name, and why one stays with stock (None: ours)."""
    return {
        name: _obstacle(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def replace_forward(module: Any) -> None:
    """Put our forward on one of `linear_modules` without an obstacle."""
    module.forward = _FORWARDS[type(module)](module)


def _obstacle(module: nn.Module) -> str | None:
    if type(module) not in _FORWARDS:
        return f"{type(module).__name__} has a forward of its own"
    return "its forward is replaced already" if "forward" in module.__dict__ else None
