"""What the backend `cpu` runs of a decoding step beside attention: products, norms and layers.

All of it is for few rows, for which reading the weights is what takes time; norms are for any.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.ops.backend.cpu_library import LEVELS, chosen_level, ready
from headwise.ops.backend.protocol import LayerOffer, Offer
from headwise.ops.modes import FEW_ROWS, are_few, are_plain, fit, needs_gradients
from headwise.ops.packed.formats import is_packed, weight_sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Experts that are chosen for them, all together.
_MOST_CHOICES = 4096


def _multiplies(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernel multiplies these plain tensors, and faster than PyTorch."""
    given = [*weights, *(bias for bias in biases if bias is not None)]
    pairs = zip(weights, biases, strict=True)
    if any(map(is_packed, weights)):
        # integers serve any number of rows, but for tiles of AMX, which multiply faster
        plain = _are_plain(x, given, most=FEW_ROWS if _has_tiles(x) else None)
        return plain and all(is_packed(weight) and fit(x, weight, bias) for weight, bias in pairs)
    return _are_plain(x, given) and all(
        fit(x, weight, bias) and 1 in weight.stride() for weight, bias in pairs
    )


def _multiplies_chosen(
    x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether the kernel multiplies rows of x [T,E] with these experts' weights, read in place."""
    tensors = [weight] if bias is None else [weight, bias]
    return (
        are_plain(x, tensors)
        and x.dtype in DTYPES
        and x.ndim == chosen.ndim == 2
        and 0 < chosen.shape[0] <= FEW_ROWS
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


def _normalises(
    x: Tensor, kind: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> bool:
    """Whether the kernel normalises x [...,E], of any number of rows, faster than PyTorch's own."""
    tensors = [tensor for tensor in (weight, bias) if tensor is not None]
    return (
        are_plain(x, tensors)
        and x.dtype in DTYPES
        and x.ndim > 0
        and x.numel() > 0
        and x.stride(-1) == 1
        and all(each.shape == x.shape[-1:] and each.is_contiguous() for each in tensors)
        and not ready()
    )


def _runs_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: bool,
    activation: int,
) -> bool:
    up, down = weights[-2:]
    into, back = zip(weights[:-1], biases[:-1], strict=True), biases[-1]
    kinds, half = set(map(is_packed, weights)), 2 if gates and len(weights) == 2 else 1
    return (
        _are_plain(x, [*weights, *(bias for bias in biases if bias is not None)])
        and len(kinds) == 1
        and all(fit(x, weight, bias) for weight, bias in into)
        and (True in kinds or all(1 in weight.stride() for weight in weights))
        and weight_sizes(down) == (x.shape[-1], len(up) // half)
        and (back is None or (back.shape == x.shape[-1:] and back.is_contiguous()))
    )


def _runs_layer(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return _are_plain(x, tensors) and all(tensor.is_contiguous() for tensor in tensors)


def _are_plain(x: Tensor, tensors: Sequence[Tensor], most: int | None = FEW_ROWS) -> bool:
    """Whether x has at most so many rows, and nothing watches the call.

    All are plain tensors of its dtype, but for packed matrices.
    """
    same = [tensor for tensor in tensors if tensor.dtype is not torch.uint8]

    def is_served(x: Tensor) -> bool:
        return x.dtype in DTYPES and x.numel() > 0 and (most is None or are_few(x, most))

    return (
        are_plain(x, same, is_served)
        and all(
            is_packed(tensor) and tensor.is_cpu and tensor.is_contiguous()
            for tensor in tensors
            if tensor.dtype is torch.uint8
        )
        and not ready()
    )


def _has_tiles(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and LEVELS[chosen_level()] == "amx"


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Products of few rows with weights that are read as they are stored, once.

    x [...,E], weights [F,E], stored by rows or transposed, and biases [F] give x weight^T + bias
    [...,F] each. Weights that are packed take any number of rows.
    """
    return tuple(
        torch.ops.headwise.linear.default(
            x.contiguous(), list(weights), list(biases), chosen_level()
        )
    )


def compiled_packed(
    x: Tensor, packed: Tensor, bias: Tensor | None
) -> Callable[..., tuple[Tensor, ...]] | None:
    """`linear` for a compiler's trace, where nothing else multiplies by a packed matrix."""
    served = x.is_cpu and packed.is_cpu and x.dtype in DTYPES and x.numel() > 0
    graded = needs_gradients(x, *([] if bias is None else [bias]))
    return linear if served and not graded and not ready() else None


def experts(x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products of few rows with the experts that were chosen for them, each read once.

    x [T,E] and chosen [T,k], or x [T k,E] with a row for each choice, weight [N,F,E], stored by
    rows or transposed, and bias [N,F] give [T,k,F]. Where N is chosen, which is none, it is zeros.
    """
    result: Tensor = torch.ops.headwise.experts.default(
        x.contiguous(), chosen.contiguous(), weight, bias, chosen_level()
    )
    return result


def norm(x: Tensor, kind: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The rows of x [...,E] normalised, in x's order of memory, as PyTorch's operators would.

    Kinds as csrc/kernels.h numbers them.
    """
    dims = None if x.is_contiguous() else sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    rows = x if dims is None else x.permute(*dims, -1).contiguous()
    result: Tensor = torch.ops.headwise.norm.default(rows, kind, weight, bias, eps, chosen_level())
    if dims is None:
        return result
    return result.permute(*(dims.index(dim) for dim in range(x.ndim - 1)), -1)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: bool,
    activation: int,
) -> Tensor:
    """act(x gate^T) * (x up^T), or act(x up^T), by down^T, for x [...,E] of few rows.

    weights: of the gate, up and down; gate and up may be one, the gate first.
    """
    result: Tensor = torch.ops.headwise.mlp.default(
        x.contiguous(), list(weights), list(biases), gates, activation, chosen_level()
    )
    return result


def attention_inputs(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """query [B,H,S,D], key and value [B,K,S,D] of x [B,S,E]: see csrc/operators/decoder_layer.cpp.

    The arguments are those of the native operator, without the level.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.headwise.attention_inputs.default(
        x.contiguous(), *arguments, chosen_level()
    )
    return result


def layer_attention(x: Tensor, *arguments: object) -> Tensor:
    """What x [B,S,E] attends to, [B,S,H,D], its keys and values being put into the buffers."""
    result: Tensor = torch.ops.headwise.layer_attention.default(
        x.contiguous(), *arguments, chosen_level()
    )
    return result


def layer_outputs(x: Tensor, attended: Tensor, *arguments: object) -> Tensor:
    """What a layer returns for x [B,S,E] and attended [B,S,H D]; arguments as above."""
    result: Tensor = torch.ops.headwise.layer_outputs.default(
        x.contiguous(), attended.contiguous(), *arguments, chosen_level()
    )
    return result


def attention_outputs(x: Tensor, attended: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """x [B,S,E] plus the output of attention, and the norm of that sum; arguments as above."""
    result: tuple[Tensor, Tensor] = torch.ops.headwise.attention_outputs.default(
        x.contiguous(), attended.contiguous(), *arguments, chosen_level()
    )
    return result


# What a `Backend` has of these.
OFFERS: dict[str, Any] = {
    "linear": Offer(linear, _multiplies),
    "experts": Offer(experts, _multiplies_chosen),
    "norm": Offer(norm, _normalises),
    "mlp": Offer(mlp, _runs_mlp),
    "layer": LayerOffer(
        layer_attention, attention_inputs, layer_outputs, attention_outputs, _runs_layer
    ),
}
