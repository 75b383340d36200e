"""Linear attention inside Transformers: a module's own forward, with our operator in it.

Such a module makes queries, keys, values, decays and betas, and hands them to two functions of its
file: one for a prompt in chunks, one for a step. Ours runs the same forward with our operator under
those names. A trial at `attach` compares it with what the file has.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import (
    ClassHook,
    has_hooks,
    is_as_first,
    is_touched,
    makes_graph,
    remember,
)
from headwise.ops import linear_attention

# Queries, heads and dims of a trial; float32, as the functions cast to it.
_TRIED, _HEADS, _DIM, _VALUE, _TOLERANCE = 70, 2, 8, 6, 1e-4
# Old names of an argument, for which stock's own wrapper knows the new one.
_RENAMED = frozenset({"cache_params", "past_key_values"})
# What a function raises that is called otherwise.
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Kind:
    """A kind of linear attention, by the names of the functions that its modules call.

    grouped: whether queries and keys may have fewer heads than values. each: whether a decay is of
    every dim of a key, or of a head.
    """

    name: str
    chunked: str
    recurrent: str
    grouped: bool
    each: bool

    @property
    def names(self) -> tuple[str, str]:
        """Both functions."""
        return self.chunked, self.recurrent


KINDS = (
    Kind(
        "gated delta rule",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        grouped=True,
        each=False,
    ),
    Kind(
        "Kimi delta attention",
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        grouped=False,
        each=True,
    ),
)


class LinearModule(ClassHook):
    """Stands in for the `forward` of a module of linear attention."""

    def __init__(self, owner: nn.Module, kind: Kind) -> None:
        super().__init__(owner)
        self.attention = kind
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_forward": None, "_names": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _prepare(self) -> None:
        """Make the forward that runs, and remember the names of the file that it uses."""
        self._forward = _with_ours(self.kind, self.attention)
        self._names = _used(self.kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives."""
        module = self.owner
        renamed = not _RENAMED.isdisjoint(kwargs)
        same = not renamed and self.is_same(module) and self._names == _used(self.kind)
        if makes_graph() or torch.is_grad_enabled() or not same or _is_held(module):
            return type(module).forward(module, *args, **kwargs)
        return self._forward(module, *args, **kwargs)


def _is_held(module: nn.Module) -> bool:
    """Whether somebody's hooks want to see a part whose weights are read without calling it."""
    return any("_hf_hook" in part.__dict__ or has_hooks(part) for part in module.children())


def _plain(kind: type[nn.Module]) -> FunctionType | None:
    """The forward of a class as it stands in its file, without what wraps it."""
    # as it lies there: that of a traced module cannot be asked for
    function: Any = inspect.unwrap(inspect.getattr_static(kind, "forward", None))
    return function if isinstance(function, FunctionType) else None


def _used(kind: type[nn.Module]) -> dict[str, int]:
    """What a class's forward finds in its file by name: somebody may put something else there."""
    plain = _plain(kind)
    assert plain is not None
    names = plain.__globals__
    return {name: id(names[name]) for name in (*plain.__code__.co_names, "l2norm") if name in names}


def _with_ours(kind: type[nn.Module], attention: Kind) -> Callable[..., Any]:
    """The forward of a class, with our operator under the names that it calls."""
    plain = _plain(kind)
    assert plain is not None
    code: CodeType = plain.__code__
    ours = {name: _operator(plain.__globals__, name) for name in attention.names}
    function = FunctionType(
        code, plain.__globals__ | ours, plain.__name__, plain.__defaults__, plain.__closure__
    )
    function.__kwdefaults__ = plain.__kwdefaults__
    return function


def _operator(names: dict[str, Any], name: str) -> Callable[..., Any]:
    """Our operator, called as the function of that name in a file of Transformers."""
    stock, norm = names[name], names["l2norm"]

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        packed = others.get("cu_seqlens") is not None or others.get("seq_idx") is not None
        if packed:
            found: tuple[Tensor, Tensor | None] = stock(
                query,
                key,
                value,
                g=g,
                beta=beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **others,
            )
            return found
        dtype = query.dtype
        rows = [tensor.transpose(1, 2).float() for tensor in (query, key, value)]
        if use_qk_l2norm_in_kernel:
            rows[:2] = (norm(tensor, dim=-1, eps=1e-6) for tensor in rows[:2])
        decay, factor = (tensor.transpose(1, 2).float() for tensor in (g, beta))
        out, state = linear_attention(*rows, decay=decay, beta=factor, state=initial_state)
        out = out.transpose(1, 2).contiguous().to(dtype)
        return out, state if output_final_state else None

    return run


def linear_modules(model: nn.Module) -> dict[str, Kind | str]:
    """The modules of linear attention, by name: their kind, or why one stays with Transformers."""
    found: dict[str, Kind | str] = {}
    tried: dict[type, str | None] = {}
    for name, module in model.named_modules():
        kind = type(module)
        attention = _kind(kind)
        if attention is None:
            continue
        if kind not in tried:
            tried[kind] = _difference(kind, attention)
        reason = tried[kind]
        if is_touched(module) or _is_held(module):
            reason = "it has hooks, or a part of it"
        found[name] = attention if reason is None else f"{attention.name}: {reason}"
    return found


def _kind(kind: type[nn.Module]) -> Kind | None:
    plain = _plain(kind)
    if plain is None:
        return None
    called = set(plain.__code__.co_names)
    for attention in KINDS:
        if called.issuperset(attention.names) and plain.__globals__.keys() >= {
            *attention.names,
            "l2norm",
        }:
            return attention
    return None


def _difference(kind: type[nn.Module], attention: Kind) -> str | None:
    """How our operator differs from the functions of the class's file; None if it does not."""
    plain = _plain(kind)
    assert plain is not None
    remember(kind)
    if not is_as_first(kind):
        return "its class has another forward"
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        # the functions warn that packages are missing, which is of no concern where ours run
        logger.setLevel(logging.ERROR)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for name, tokens in ((attention.chunked, _TRIED), (attention.recurrent, 2)):
                given = _inputs(attention, tokens)
                expected = plain.__globals__[name](**given)
                ours = _operator(plain.__globals__, name)(**given)
                if not all(map(_near, ours, expected)):
                    return f"{name} of its file gives something else"
    except _FAULTS as error:
        fault = str(error).partition("\n")[0]
        return f"the functions of its file cannot be tried ({type(error).__name__}: {fault})"
    finally:
        logger.setLevel(level)
    return None


def _inputs(attention: Kind, tokens: int) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu")

    heads = _HEADS if attention.grouped else 2 * _HEADS
    rows = (1, tokens, 2 * _HEADS)
    return {
        "query": random(1, tokens, heads, _DIM),
        "key": random(1, tokens, heads, _DIM),
        "value": random(*rows, _VALUE),
        "g": -random(*rows, _DIM).abs() if attention.each else -random(*rows).abs(),
        "beta": random(*rows).sigmoid(),
        "initial_state": random(1, 2 * _HEADS, _DIM, _VALUE),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def _near(ours: Tensor, stock: Tensor) -> bool:
    bound = _TOLERANCE * (1 + float(stock.abs().max()))
    return ours.shape == stock.shape and bool((ours - stock).abs().max() <= bound)
