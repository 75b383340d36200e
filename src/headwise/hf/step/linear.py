"""Products of few rows: what stands in for the `forward` of nn.Linear and of Conv1D, as GPT-2 has.

A decoding step spends most of its time in them: each reads its whole weight for a row or a few.
"""

from torch import Tensor, nn
from torch.nn import functional

from headwise.hf.module_hook import ModuleHook
from headwise.hf.step.replaced import Replaced
from headwise.hf.stock_names import Conv1D
from headwise.ops import faster


class LinearForward(ModuleHook):
    """Stands in for the `forward` of an nn.Linear: the class's own, but for few rows."""

    def __call__(self, input: Tensor) -> Tensor:
        """[...,E] to [...,F]."""
        module = self.owner
        given = input, (module.weight,), (module.bias,)
        run = faster("linear", *given) if is_stock(module, nn.Linear) else None
        if run is None:
            stock: Tensor = type(module).forward(module, input)
            return stock
        result: Tensor = run(*given)[0]
        return result


class Conv1dForward(ModuleHook):
    """Stands in for the `forward` of a Conv1D, whose weight [E,F] is stored transposed."""

    def __call__(self, x: Tensor) -> Tensor:
        """[...,E] to [...,F]."""
        module = self.owner
        run = None
        if is_stock(module, Conv1D):
            given = x, (module.weight.t(),), (module.bias,)
            run = faster("linear", *given)
        if run is None:
            stock: Tensor = type(module).forward(module, x)
            return stock
        result: Tensor = run(*given)[0]
        return result


# What others may put in place of their own for all modules.
_STOCK = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}
_LINEAR = functional.linear


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, and the class multiplies as it always did."""
    return type(module) is kind and kind.forward is _STOCK[kind] and functional.linear is _LINEAR


_FORWARDS: dict[type[nn.Module], type[ModuleHook]] = {
    nn.Linear: LinearForward,
    Conv1D: Conv1dForward,
}


def replaced_linear(model: nn.Module) -> Replaced:
    """The modules that multiply by a weight."""
    reasons = {
        name: _obstacle(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    what = "products of up to 16 rows"
    return Replaced(what, "weights", reasons, lambda module: _FORWARDS[type(module)](module))


def _obstacle(module: nn.Module) -> str | None:
    if type(module) not in _FORWARDS:
        return f"{type(module).__name__} has a forward of its own"
    return "its forward is replaced already" if "forward" in module.__dict__ else None
