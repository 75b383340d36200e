"""`choose_keys`: the keys that weigh most for each query, by the fastest backend that offers it."""

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import require_tensor
from headwise.ops.backend import choose_offer
from headwise.ops.integers.operator import quantize
from headwise.ops.sketch.call import Budget, ChoiceCall
from headwise.ops.views import QuantKV


def choose_keys(
    query: Tensor,
    sketch: QuantKV,
    budget: Budget,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys with the largest attention weights by a sketch of them: one choice per kv head.

    Example:
        >>> import torch, headwise
        >>> from headwise.ops import Budget, choose_keys, sketch_of
        >>> query = torch.randn(1, 8, 1, 64)
        >>> key, value = torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> budget = Budget(most=100, first=4, recent=32)
        >>> chosen, rest = choose_keys(query, sketch_of(key), budget)
        >>> chosen.shape, rest.shape
        (torch.Size([1, 2, 1, 100]), torch.Size([1, 8, 1]))
        >>> out = headwise.attention(query, key, value, causal=True, indices=chosen)
        >>> out = headwise.ops.add_rest(out, rest, headwise.ops.means_of(value, queries=1))

    Each query head gives its keys softmax weights by the sketch; those of a kv head's query heads
    are added up, and the largest sums win. The sketch is read once. It has no gradient.

    Args:
        query: [B, H, S, D].
        sketch: the keys in 4 bits, of K kv heads: `sketch_of(key)`, or what a `QuantizedCache` of 4
            bits, or a `PagedCache`, gives.
        budget: how many keys a query gets.
        causal: as in `attention`, like `scale`, `softcap` and the learned `sinks` [H].
        mask: boolean, True = may be chosen; broadcasts to [B, 1, S, L].

    Returns:
        int32 [B, K, S, min(most, L)]: positions, ascending; of equal weights the first; then -1.
        What `indices` of `attention` takes. And float32 [B, H, S]: the part of each head's softmax
        that the other keys have, what `add_rest` takes.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together, or a budget that cannot be.

    Source: the sketch is the int4 cache's (QuaRot, arXiv 2404.00456); a choice by estimated weights
    is that of Double Sparsity (arXiv 2408.07092), that of a part of the weight Twilight's (arXiv
    2502.02770).
    """
    require_tensor("query", query, 4)
    if not isinstance(sketch, QuantKV) or sketch.bits != 4:
        said = f"of {sketch.bits} bits" if isinstance(sketch, QuantKV) else type(sketch).__name__
        raise ShapeError(f"sketch is {said}, expected a QuantKV of 4 bits")
    sketch.check(query)
    batch, heads, length, dim = query.shape
    sequences, kv_heads, context, key_dim, _ = sketch.shape
    if (sequences, key_dim) != (batch, dim) or kv_heads < 1 or heads % kv_heads:
        raise ShapeError(
            f"query has shape {list(query.shape)} and the sketch is of keys "
            f"{[sequences, kv_heads, context, key_dim]}: B and D must agree, and K divide H"
        )
    _check_budget(budget)
    budget = budget.within(context)
    if sinks is not None:
        require_tensor("sinks", sinks, 1)
        if sinks.shape[0] != heads or not sinks.is_floating_point():
            raise ShapeError(f"sinks has shape {list(sinks.shape)}, expected [{heads}] of floats")
    if mask is not None:
        mask = _four_dims(mask, (batch, 1, length, context))
    call = ChoiceCall(
        query.detach(),
        sketch,
        budget,
        dim**-0.5 if scale is None else scale,
        softcap,
        None if sinks is None else sinks.detach(),
        causal,
        mask,
    )
    chosen, rest = choose_offer("choose", None, call)(call)
    return chosen, rest


def sketch_of(key: Tensor) -> QuantKV:
    """Keys [B, K, L, D] in 4 bits, without values, for `choose_keys`; D is even.

    >>> sketch_of(torch.randn(1, 2, 100, 64)).key.shape
    torch.Size([1, 2, 100, 32])
    """
    integers, scales = quantize(key, 4)
    return keys_alone(integers, scales)


def keys_alone(integers: Tensor, scales: Tensor) -> QuantKV:
    """A view of rounded keys, which stand for the values too."""
    return QuantKV(key=integers, key_scales=scales, value=integers, value_scales=scales, bits=4)


def _check_budget(budget: Budget) -> None:
    ints = (budget.most, budget.least, budget.first, budget.recent)
    fits = all(isinstance(n, int) and n >= 0 for n in ints) and budget.most >= 1
    if not fits or max(budget.least, budget.first + budget.recent) > budget.most:
        raise ShapeError(
            f"{budget}: expected counts from 0, of which least and first + recent are at most "
            "most, and that 1 or more"
        )
    if budget.mass is not None and not 0 < budget.mass <= 1:
        raise ShapeError(f"mass is {budget.mass!r}, expected a part of the weight, above 0, to 1")


def _four_dims(mask: Tensor, full: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim > 4:
        raise ShapeError(f"mask is {mask!r:.60}, expected a boolean tensor")
    mask = mask[(None,) * (4 - mask.ndim)]
    if any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise ShapeError(
            f"mask has shape {list(mask.shape)}, expected one that broadcasts to [B, 1, S, L] = "
            f"{list(full)}"
        )
    return mask
