"""One attention call: its tensors and options, checked, and the facts that a backend decides by.

An option of attention is a field of `Options`, with its check, and a fact in `Problem`. `Problem`
holds no tensor: whether a backend can serve a call follows from shapes, dtype, device and options
alone, so a decision can be made (and explained) before there is any data.
"""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import (
    check_chosen,
    check_mask_and_bias,
    check_positions,
    require_lengths,
    require_like,
    require_per_head,
    require_tensor,
)
from headwise.ops.modes import forward_mode
from headwise.ops.views import KV
from headwise.spec import AttentionSpec

# B, H, S, D of the query, then K, L and V.
Sizes = tuple[int, int, int, int, int, int, int]


# None of these classes is frozen: that would take as long to build as everything else in a call.
@dataclass(kw_only=True, slots=True, eq=False)
class Options:
    """What a score is made with beside query and key; the fields are arguments of `attention`."""

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    kv_lengths: Tensor | None = None
    key_positions: Tensor | None = None
    indices: Tensor | None = None
    block_indices: Tensor | None = None
    block_size: int | None = None
    return_lse: bool = False

    @property
    def chooses(self) -> bool:
        """Whether the keys that a query attends to are chosen."""
        return self.indices is not None or self.block_indices is not None

    @property
    def chosen(self) -> Tensor | None:
        """The keys that each query attends to, or the blocks of them; None where it does to all."""
        return self.block_indices if self.indices is None else self.indices

    def check(self, query: Tensor, full: tuple[int, int, int, int], kv_heads: int) -> None:
        """Raise `ShapeError` on the first option that does not fit `full`, [B, H, S, L].

        A mask or bias of fewer dims gets leading ones of size 1, as in any broadcasting.
        """
        if not is_number(self.scale):
            raise ShapeError(f"scale is {self.scale!r}, expected a finite number")
        if self.window is not None:
            whole = isinstance(self.window, int) and not isinstance(self.window, bool)
            if not whole or not 1 <= self.window < 2**63:
                raise ShapeError(f"window is {self.window!r}, expected an int of at least 1")
            if not self.causal:
                raise ShapeError("window needs causal=True: give a symmetric window as a mask")
        if self.softcap is not None and not (is_number(self.softcap) and self.softcap > 0):
            raise ShapeError(f"softcap is {self.softcap!r}, expected a finite number above 0")
        if self.mask is not None or self.bias is not None:
            check_mask_and_bias(self.mask, self.bias, query, full)
            self.mask, self.bias = _four_dims(self.mask), _four_dims(self.bias)
        if self.sinks is not None:
            require_per_head("sinks", self.sinks, full[1], query)
        if self.alibi_slopes is not None:
            require_per_head("alibi_slopes", self.alibi_slopes, full[1], query)
        if self.kv_lengths is not None:
            require_lengths(self.kv_lengths, full[0], full[3], query.device)
        if self.chooses or self.block_size is not None:
            given = (self.indices, self.block_indices, self.block_size)
            check_chosen(*given, query, full, kv_heads)
        if self.key_positions is not None:
            others = {
                "alibi_slopes": self.alibi_slopes,
                "kv_lengths": self.kv_lengths,
                "chosen keys": self.chosen,
            }
            check_positions(self.key_positions, full[3], self.causal, others)

    def native(self) -> tuple[object, ...]:
        """What a native operator takes, in the order of csrc/options.h; 0 where there is none."""
        return (
            self.causal,
            self.window or 0,
            self.softcap or 0.0,
            _vector(self.sinks),
            _vector(self.alibi_slopes),
            self.bias,
            self.mask,
            None if self.indices is None else contiguous_rows(self.indices),
            None if self.block_indices is None else contiguous_rows(self.block_indices),
            self.block_size or 0,
        )


def _vector(per_head: Tensor | None) -> Tensor | None:
    return None if per_head is None else per_head.detach().float().contiguous()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the elements of its last dim do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, and no tensor."""
    # float and int first: asking an abstract class takes a microsecond
    return isinstance(value, (float, int, Real)) and -math.inf < float(value) < math.inf


def _most_chosen(options: Options, context: int) -> int | None:
    chosen = options.chosen
    return None if chosen is None else min(context, chosen.shape[3] * (options.block_size or 1))


def default_scale(query: Any) -> float:
    """D^-0.5; any number where `query` is not what a check accepts."""
    whole = isinstance(query, Tensor) and query.ndim > 0 and query.shape[-1] > 0
    return float(query.shape[-1]) ** -0.5 if whole else 1.0


def _four_dims(extra: Tensor | None) -> Tensor | None:
    return extra if extra is None or extra.ndim == 4 else extra[(None,) * (4 - extra.ndim)]


@dataclass(kw_only=True, slots=True)
class Problem:
    """Everything about a call but its data. Names are those of the operator's contract.

    layout: "dense" for two tensors, or that of a view: "paged", "int8", "paged int8" and the same
    of 4 bits. chosen: keys that a query attends to at most, where they are chosen for it.
    """

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    context: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    causal: bool = False
    window: int | None = None
    sinks: bool = False
    softcap: bool = False
    alibi: bool = False
    bias: torch.dtype | None = None
    mask: bool = False
    ragged: bool = False
    chosen: int | None = None
    lse: bool = False
    needs_grad: bool = False
    tangents: bool = False
    split_key: bool = False
    layout: str = "dense"

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head, G = H / K."""
        return self.heads // self.kv_heads

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        *,
        query_length: int,
        context: int,
        dtype: torch.dtype,
        device: str = "cpu",
        **facts: Any,
    ) -> "Problem":
        """What one sequence asks of a layer of this spec; `facts` are other fields.

        >>> spec = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
        >>> Problem.of(spec, query_length=1, context=50, dtype=torch.float32).group_size
        3
        """
        others: dict[str, Any] = {"batch": 1, "mask": spec.chunked, **facts}
        return cls(
            **others,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            query_length=query_length,
            context=context,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            dtype=dtype,
            device=device,
            # chunks are a mask to an operator, which then is all that hides
            causal=spec.causal and not spec.cross and not spec.chunked,
            window=spec.window if spec.causal and not spec.chunked else None,
            sinks=spec.sinks,
            softcap=spec.softcap is not None,
            alibi=spec.alibi,
            bias=dtype if spec.relative_bias else None,
            chosen=None if spec.indexer is None else min(context, spec.indexer.topk),
        )


@dataclass(slots=True, eq=False)
class AttentionCall:
    """The tensors and options of one call.

    query [B,H,S,D], key [B,K,L,D], value [B,K,L,V]. With a split key (absorbed MLA) the last dims
    of query and key are held apart: query_tail [B,H,S,P], key_tail [B,K,L,P], and a score is the
    sum of both products. With a view of a cache, `kv`, key, value and key_tail are its tensors as
    they are; `dense` takes keys and values out of it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: Options
    query_tail: Tensor | None = None
    key_tail: Tensor | None = None
    kv: KV | None = None

    def sizes(self) -> Sizes:
        """B, H, S and D of the query, then K, L and V; a split key's tail is not counted."""
        batch, heads, length, dim = self.query.shape
        if self.kv is None:
            _, kv_heads, context, _ = self.key.shape
            return batch, heads, length, dim, kv_heads, context, self.value.shape[3]
        _, kv_heads, context, _, value_dim = self.kv.shape
        split = self.query_tail is not None  # then the value is the key
        return batch, heads, length, dim, kv_heads, context, dim if split else value_dim

    def dense(self) -> "AttentionCall":
        """The same call with keys and values as tensors."""
        if self.kv is None:
            return self
        first, second = self.kv.dense(self.query.dtype)
        if self.query_tail is None:
            return replace(self, key=first, value=second, kv=None)
        return replace(self, key=first, value=first, key_tail=second, kv=None)

    def problem(self, sizes: Sizes | None = None) -> Problem:
        """The facts that backends decide by."""
        batch, heads, length, dim, kv_heads, context, value_dim = sizes or self.sizes()
        query, tail, options = self.query, self.query_tail, self.options
        placed = options.key_positions is not None  # such keys come as a mask: by_position.py
        return Problem(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_length=length,
            context=context,
            head_dim=dim if tail is None else dim + tail.shape[-1],
            value_dim=value_dim,
            dtype=query.dtype,
            device=query.device.type,
            causal=options.causal and not placed,
            window=None if placed else options.window,
            sinks=options.sinks is not None,
            softcap=options.softcap is not None,
            alibi=options.alibi_slopes is not None,
            bias=None if options.bias is None else options.bias.dtype,
            mask=options.mask is not None or placed,
            ragged=options.kv_lengths is not None,
            chosen=_most_chosen(options, context) if options.chooses else None,
            lse=options.return_lse,
            needs_grad=torch.is_grad_enabled() and self._requires_grad(),
            tangents=forward_mode(),
            split_key=tail is not None,
            layout="dense" if self.kv is None else self.kv.layout,
        )

    def _requires_grad(self) -> bool:
        options = self.options
        tensors = (
            *(self.query, self.key, self.value, self.query_tail, self.key_tail),
            *(options.sinks, options.alibi_slopes, options.bias),
        )
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check(call: AttentionCall) -> Problem:
    """The facts of `call`, or `ShapeError` on the first thing that does not fit."""
    query, key, value, kv = call.query, call.key, call.value, call.kv
    require_tensor("query", query, 4)
    if kv is None:
        require_tensor("key", key, 4)
        require_tensor("value", value, 4)
        require_like(query, key=key, value=value)
    else:
        require_like(query)
        kv.check(query)
    sizes = batch, heads, length, dim, kv_heads, context, value_dim = call.sizes()
    key_batch, _, _, key_dim = key.shape if kv is None else kv.shape[:4]
    if key_batch != batch or key_dim != dim:
        shape = [key_batch, kv_heads, context, key_dim]
        raise ShapeError(
            f"key has shape {shape}, expected [B, K, L, D] with B={batch} and D={dim} as in "
            f"query {list(query.shape)}"
        )
    if kv is None and value is not key and value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            f"value has shape {list(value.shape)}, expected [B, K, L, V] with the same B, K and L "
            f"as key {list(key.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"query has {heads} heads and key has {kv_heads}: the query heads must be a multiple "
            "of the kv heads"
        )
    if dim == 0 or value_dim == 0:
        raise ShapeError("head dims of 0 are not attention: give D and V of at least 1")
    call.options.check(query, (batch, heads, length, context), kv_heads)
    return call.problem(sizes)
