"""The backend `cpu`: the C++ kernels of `csrc`, which read each key and value once per kv head.

Covers decoding, prefill and absorbed MLA with every option of the operator; not float64, not
gradients. The library is loaded at the first question about it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from headwise.errors import OptionError
from headwise.ops.attend.call import AttentionCall, Problem
from headwise.ops.backend.cpu_shapes import register_shapes
from headwise.ops.backend.protocol import (
    Accepted,
    Backend,
    LayerOffer,
    Offer,
    Rejected,
    Verdict,
)
from headwise.ops.modes import are_plain, fit, forward_mode, needs_gradients
from headwise.ops.views import PagedKV, QuantKV

# The instruction sets that the kernels are built for, slowest first: the index is the level.
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
# Set to one of LEVELS, it forces a lower one than the machine has.
LEVEL_VARIABLE = "HEADWISE_CPU_LEVEL"

# What the operators in csrc/operators accept.
_MOST_DIM = 576
_MOST_KEYS = 2**31 - 1
# Rows a head up to which reading the matrix is what a product takes.
_MOST_PROJECTED = 16
# Experts that are chosen for them, all together.
_MOST_CHOICES = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILE = "libheadwise_cpu.so"

# Why the library cannot be used, "" if it can, None before it was looked for.
_missing: str | None = None
_best = 0
_level = 0


def available() -> tuple[bool, str]:
    """Whether the library is there and loads, and why not."""
    try:
        missing = ready()
    except OptionError as error:
        return False, str(error)
    return (False, missing) if missing else (True, f"C++ kernels for {LEVELS[_level]}")


_Function = TypeVar("_Function", bound=Callable[..., object])


def _constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler for this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def ready() -> str:
    """Load the library once; "" when its operator can be called, else why not.

    Raises:
        OptionError: the environment forces a level that is unknown or higher than the machine's.
    """
    global _missing, _level
    if _missing is None:
        _missing = _load()
        if not _missing:
            try:
                _level = forced_level(os.environ.get(LEVEL_VARIABLE), _best)
            except OptionError:
                _missing = None
                raise
    return _missing


@_constant
def _chosen_level() -> int:
    return _level


def forced_level(name: str | None, best: int) -> int:
    """The level called `name`, or `best` where none is asked for.

    >>> forced_level("avx2", best=3), forced_level(None, best=3)
    (1, 3)
    """
    if not name:
        return best
    able = LEVELS[: best + 1]
    if name not in able:
        raise OptionError(
            f"{LEVEL_VARIABLE} is {name!r}, expected one of {', '.join(able)} on this machine"
        )
    return able.index(name)


def _load() -> str:
    global _best
    if not hasattr(torch.ops.headwise, "attend"):
        # an editable install has two folders: the sources, and what was built
        folders = [Path(folder) for folder in sys.modules["headwise"].__path__]
        files = [folder / _FILE for folder in folders if (folder / _FILE).is_file()]
        if not files:
            return (
                "the C++ library was not built when headwise was installed (no C++17 compiler, or "
                "it failed): reinstall with pip install -v to see why"
            )
        try:
            torch.ops.load_library(files[0])
        except OSError as error:
            return f"the C++ library does not load: {str(error).splitlines()[0]}"
        register_shapes()
    _best = torch.ops.headwise.best_level()
    return ""


_DENSE = Accepted("cpu", "C++, each key and value read once for all heads of a group")
_LATENT = Accepted("cpu", "C++, each latent read once for all heads")


def _accepts(problem: Problem) -> Verdict:
    obstacle = _obstacle(problem)
    if obstacle is not None:
        return Rejected("cpu", obstacle)
    verdict = _LATENT if problem.split_key else _DENSE
    if problem.layout == "dense":
        return verdict
    return Accepted("cpu", f"{verdict.reason}, {problem.layout} in place")


def _obstacle(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`; None if they can."""
    if problem.device != "cpu":
        return f"runs on cpu, the tensors are on {problem.device}"
    if problem.needs_grad or problem.tangents:
        return "has no gradients"
    if problem.dtype not in _DTYPES:
        return f"no kernel for {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > _MOST_DIM:
        return f"no kernel for head dims above {_MOST_DIM}"
    if problem.context > _MOST_KEYS:
        return f"no kernel for more than {_MOST_KEYS:,} keys"
    return ready() or None


def _attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    kv, options = call.kv, call.options
    key, value, key_tail = call.key, call.value, call.key_tail
    page_table, context = None, 0
    scales: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(kv, PagedKV):
        page_table, context = _rows(kv.page_table), kv.context
    elif isinstance(kv, QuantKV):
        key, first, second = kv.key, _rows(kv.key_scales), _rows(kv.value_scales)
        scales = (first, second, None)
        if call.query_tail is not None:  # the latent is keys and values, the rope key beside it
            key_tail, scales = kv.value, (first, first, second)
    try:
        out, lse = torch.ops.headwise.attend.default(
            _rows(call.query),
            _rows(key),
            _rows(value),
            None if call.query_tail is None else _rows(call.query_tail),
            None if key_tail is None else _rows(key_tail),
            page_table,
            context,
            *scales,
            None if options.kv_lengths is None else options.kv_lengths.contiguous(),
            options.scale,
            options.return_lse,
            _chosen_level(),
            *options.native(),
        )
    except RuntimeError:
        if isinstance(kv, PagedKV):  # pages that do not exist are found there
            kv.check_pages()
        raise
    return out, lse if options.return_lse else None


def _projects(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is faster than a matrix product of PyTorch's."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.shape[0] * x.shape[2] <= _MOST_PROJECTED
        and not needs_gradients(x, weight)
        and not forward_mode()
        and not ready()
    )


def project(x: Tensor, weight: Tensor, *, up: bool) -> Tensor:
    """A product of few rows with one matrix per head, which is read once.

    x [B,H,S,N] and weight [H,N,R] give [B,H,S,R] with `up`; x [B,H,S,R] and weight [H,V,R] give
    x weight^T [B,H,S,V] without.
    """
    result: Tensor = torch.ops.headwise.project.default(
        _rows(x), _rows(weight), up, _chosen_level()
    )
    return result


def _multiplies(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernel multiplies these plain tensors, and faster than PyTorch."""
    return _are_plain(x, [*weights, *(bias for bias in biases if bias is not None)]) and all(
        fit(x, weight, bias) and 1 in weight.stride()
        for weight, bias in zip(weights, biases, strict=True)
    )


def _multiplies_chosen(
    x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether the kernel multiplies rows of x [T,E] with these experts' weights, read in place."""
    tensors = [weight] if bias is None else [weight, bias]
    return (
        are_plain(x, tensors)
        and x.dtype in _DTYPES
        and x.ndim == chosen.ndim == 2
        and 0 < chosen.shape[0] <= _MOST_PROJECTED
        and 0 < chosen.numel() <= _MOST_CHOICES
        and x.shape[0] in (chosen.shape[0], chosen.numel())
        and chosen.dtype == torch.int64
        and chosen.is_cpu
        and weight.ndim == 3
        and weight.shape[2] == x.shape[1] > 0
        and 1 in weight.stride()[1:]
        and (bias is None or (bias.shape == weight.shape[:2] and bias.stride(1) == 1))
        and not ready()
    )


def _runs_layer(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return _are_plain(x, tensors) and all(tensor.is_contiguous() for tensor in tensors)


def _are_plain(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether x has few rows, all are plain tensors of its dtype, and nothing watches the call."""
    return (
        are_plain(x, tensors)
        and x.dtype in _DTYPES
        and x.ndim > 0
        and 0 < x.numel() <= _most_rows(x.dtype) * x.shape[-1]
        and not ready()
    )


def _most_rows(dtype: torch.dtype) -> int:
    """Rows of x up to which reading the weight is what a product takes."""
    # PyTorch multiplies more of them by AMX, in tiles of 16, and these kernels one by one
    return 4 if dtype == torch.bfloat16 and LEVELS[_level] == "amx" else _MOST_PROJECTED


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Products of few rows with weights that are read as they are stored, once.

    x [...,E], weights [F,E], stored by rows or transposed, and biases [F] give x weight^T + bias
    [...,F] each.
    """
    return tuple(
        torch.ops.headwise.linear.default(
            x.contiguous(), list(weights), list(biases), _chosen_level()
        )
    )


def experts(x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products of few rows with the experts that were chosen for them, each read once.

    x [T,E] and chosen [T,k], or x [T k,E] with a row for each choice, weight [N,F,E], stored by
    rows or transposed, and bias [N,F] give [T,k,F]. Where N is chosen, which is none, it is zeros.
    """
    result: Tensor = torch.ops.headwise.experts.default(
        x.contiguous(), chosen.contiguous(), weight, bias, _chosen_level()
    )
    return result


def attention_inputs(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """query [B,H,S,D], key and value [B,K,S,D] of x [B,S,E]: see csrc/operators/decoder_layer.cpp.

    The arguments are those of the native operator, without the level.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.headwise.attention_inputs.default(
        x.contiguous(), *arguments, _level
    )
    return result


def layer_attention(x: Tensor, *arguments: object) -> Tensor:
    """What x [B,S,E] attends to, [B,S,H,D], its keys and values being put into the buffers."""
    result: Tensor = torch.ops.headwise.layer_attention.default(x.contiguous(), *arguments, _level)
    return result


def layer_outputs(x: Tensor, attended: Tensor, *arguments: object) -> Tensor:
    """What a layer returns for x [B,S,E] and attended [B,S,H D]; arguments as above."""
    result: Tensor = torch.ops.headwise.layer_outputs.default(
        x.contiguous(), attended.contiguous(), *arguments, _level
    )
    return result


def attention_outputs(x: Tensor, attended: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """x [B,S,E] plus the output of attention, and the norm of that sum; arguments as above."""
    result: tuple[Tensor, Tensor] = torch.ops.headwise.attention_outputs.default(
        x.contiguous(), attended.contiguous(), *arguments, _level
    )
    return result


def _quantizes(rows: Tensor, bits: int) -> bool:
    served = rows.device.type == "cpu" and rows.dtype in _DTYPES
    return served and rows.shape[-1] <= _MOST_DIM and not ready()


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows [..., D]."""
    before, four = rows.shape[:-1], rows.detach()
    if rows.ndim != 4:
        four = four.reshape(1, 1, -1, rows.shape[-1])
    integers, scales = torch.ops.headwise.quantize.default(_rows(four), bits, _chosen_level())
    return integers.view(*before, integers.shape[-1]), scales.view(*before, scales.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


BACKEND = Backend(
    "cpu",
    available,
    _accepts,
    _attend,
    linear=Offer(linear, _multiplies),
    experts=Offer(experts, _multiplies_chosen),
    layer=LayerOffer(
        layer_attention, attention_inputs, layer_outputs, attention_outputs, _runs_layer
    ),
    project=Offer(project, _projects),
    quantize=Offer(quantize, _quantizes),
)
