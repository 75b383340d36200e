"""What a family needs of attention, where stock runs it eagerly only and there is no config reader.

Its own eager function says it. What a module hands to the attention function is read in its source,
and then that function and ours are given the same few random numbers.
"""

import ast
import copy
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.attend import attend_rows
from headwise.hf.dropout import eager_function
from headwise.hf.empty_rows import EAGER
from headwise.hf.request import read_request

# What modules call the function that they get from the interface.
_FUNCTION = "attention_interface"
_KNOWN = {*inspect.signature(read_request).parameters, "attention_mask"}
# A mask that arrives says the last two and chosen keys, and dropout is stock's own.
_LEFT_OUT = {"attention_mask", "dropout", "indices", "is_causal", "sliding_window"}
# What a module makes anew for every call.
_OF_A_CALL = {"position_bias", "scaling", "sinks"}
_BATCH, _QUERIES, _KEYS, _DIM = 2, 3, 5, 8
# Of numbers of about 1; eager attention takes its softmax in float32.
_TOLERANCE = 1e-5


def obstacle(model: nn.Module) -> str | None:
    """Why ours is not known to do what a model's eager attention does; None where it is."""
    attends = False
    for name, module in model.named_modules():
        kind: Any = type(module)
        calls = _calls(kind)
        inside = calls or any(_calls(part) for part in map(type, module.modules()))
        if not inside and "Attention" in kind.__name__:
            return f"{name}, a {kind.__name__}, is not on the attention interface"
        attends |= bool(calls)
        for call in calls:
            reason = _difference(module, call)
            if reason is not None:
                return f"{name}: {reason}"
    return None if attends else "no attention, only states, which headwise does not run"


@cache
def _calls(kind: type) -> tuple[ast.Call, ...]:
    """Where a class of modules calls the attention function."""
    owner = next((base for base in kind.__mro__ if "forward" in vars(base)), nn.Module)
    if owner.__module__.startswith("torch."):
        return ()
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except OSError:  # of a notebook: attention whose source cannot be read was refused before
        return ()
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return tuple(node for node in calls if getattr(node.func, "id", None) == _FUNCTION)


def _difference(module: nn.Module, call: ast.Call) -> str | None:
    """What the attention of one call has that ours does not; None where they agree."""
    eager = eager_function(module)
    if eager is None:
        return "its family has no eager attention to compare with"
    named = inspect.signature(eager).parameters.items()
    unknown = {name for name, one in named if one.kind is not one.VAR_KEYWORD} - _KNOWN
    if unknown:
        return f"its eager attention takes {', '.join(sorted(unknown))}, which headwise does not"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            tensors, keywords = _inputs(module, call)
            expected, _ = eager(*tensors, **keywords)
            request = read_request(*tensors, **keywords)
            ours, _, _ = attend_rows(request)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"its eager attention could not be tried: {str(error).splitlines()[0]}"
    if not torch.allclose(ours, expected, rtol=0, atol=_TOLERANCE):
        return "its eager attention gives something else"
    return None


def _inputs(module: nn.Module, call: ast.Call) -> tuple[list[Any], dict[str, Any]]:
    """Random numbers for a call: a twin of the module, query, key, value and mask; keywords.

    The twin has random parameters, for the module's own may be zeros still (sinks), or anywhere.

    Raises:
        ValueError: what the module hands over cannot be read off it.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    twin: Any = copy.copy(module)
    own = module._parameters.items()
    parameters = {name: None if one is None else numbers(*one.shape) for name, one in own}
    twin.__dict__.update({"_parameters": parameters, "training": False, EAGER: True})
    given = {at.arg: at.value for at in call.keywords if at.arg in _KNOWN - _LEFT_OUT}
    keywords: dict[str, Any] = {
        name: _value(twin, node) for name, node in given.items() if name not in _OF_A_CALL
    }
    sinks, groups = keywords.get("s_aux"), getattr(module, "num_key_value_groups", 1)
    heads = 2 * groups if sinks is None else sinks.numel()
    if "scaling" in given:
        keywords["scaling"] = 0.3
    if "position_bias" in given:
        keywords["position_bias"] = numbers(1, heads, _QUERIES, _KEYS)
    if "sinks" in given:
        keywords["sinks"] = numbers(_BATCH, heads, _QUERIES, 1)
    query = numbers(_BATCH, heads, _QUERIES, _DIM)
    key, value = (numbers(_BATCH, heads // groups, _KEYS, _DIM) for _ in range(2))
    mask = [at.value for at in call.keywords if at.arg == "attention_mask"] or call.args[4:5]
    none = not mask or (isinstance(mask[0], ast.Constant) and mask[0].value is None)
    return [twin, query, key, value, None if none else _mask()], keywords


def _value(module: Any, node: ast.expr) -> Any:
    """A constant, or an attribute of the module."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        return getattr(_value(module, node.value), node.attr)
    raise ValueError(f"it is handed {ast.unparse(node)}, which is not an attribute of the module")


def _mask() -> Tensor:
    """[B,1,S,L] as eager attention has it: causal, with padding, and a row that sees nothing."""
    hidden = torch.ones(_BATCH, 1, _QUERIES, _KEYS, dtype=torch.float64, device="cpu")
    hidden = hidden.triu(_KEYS - _QUERIES + 1)
    hidden[0, :, :, :2] = 1
    hidden[0, :, 0] = 1
    return hidden * torch.finfo(torch.float32).min
