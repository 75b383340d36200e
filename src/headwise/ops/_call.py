"""One attention call: its tensors, checked, and the facts about it that a backend decides by.

`Problem` holds no tensor: whether a backend can serve a call follows from shapes, dtype, device and
options alone, so a decision can be made (and explained) before there is any data.
"""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headwise.errors import ShapeError
from headwise.ops._views import KV

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Neither class is frozen: that would take as long to build as everything else about a call.
@dataclass(kw_only=True, slots=True)
class Problem:
    """Everything about a call but its data. Names are those of the operator's contract.

    layout: "dense" for two tensors, or that of a view: "paged", "int8", "int4".
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
    lse: bool = False
    needs_grad: bool = False
    tangents: bool = False
    split_key: bool = False
    layout: str = "dense"

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head, G = H / K."""
        return self.heads // self.kv_heads


@dataclass(kw_only=True, slots=True, eq=False)
class AttentionCall:
    """The tensors and options of one call, after `check` has accepted them.

    query [B,H,S,D], key [B,K,L,D], value [B,K,L,V]. With a split key (absorbed MLA) the last dims
    of query and key are held apart: query_tail [B,H,S,P], key_tail [B,K,L,P], and a score is the
    sum of both products. With a view of a cache, `kv`, key, value and key_tail are its tensors as
    they are; `dense` takes keys and values out of it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_tail: Tensor | None = None
    key_tail: Tensor | None = None
    causal: bool
    scale: float
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    kv_lengths: Tensor | None = None
    return_lse: bool = False
    kv: KV | None = None

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """B, K, L, D and V of keys and values, a split key's tail left out."""
        if self.kv is not None:
            batch, heads, context, dim, value_dim = self.kv.shape
            return batch, heads, context, dim, dim if self.query_tail is not None else value_dim
        batch, heads, context, dim = self.key.shape
        return batch, heads, context, dim, self.value.shape[3]

    def dense(self) -> "AttentionCall":
        """The same call with keys and values as tensors."""
        if self.kv is None:
            return self
        first, second = self.kv.dense(self.query.dtype)
        if self.query_tail is None:
            return replace(self, key=first, value=second, kv=None)
        return replace(self, key=first, value=first, key_tail=second, kv=None)

    def problem(self) -> Problem:
        """The facts that backends decide by."""
        query = self.query
        batch, heads, query_length, head_dim = query.shape
        _, kv_heads, context, _, value_dim = self.kv_shape
        if self.query_tail is not None:
            head_dim += self.query_tail.shape[-1]
        return Problem(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_length=query_length,
            context=context,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=query.dtype,
            device=query.device.type,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks is not None,
            softcap=self.softcap is not None,
            alibi=self.alibi_slopes is not None,
            bias=None if self.bias is None else self.bias.dtype,
            mask=self.mask is not None,
            ragged=self.kv_lengths is not None,
            lse=self.return_lse,
            needs_grad=torch.is_grad_enabled() and self._requires_grad(),
            tangents=forward_mode(),
            split_key=self.query_tail is not None,
            layout="dense" if self.kv is None else self.kv.layout,
        )

    def _requires_grad(self) -> bool:
        tensors = (
            *(self.query, self.key, self.value, self.query_tail, self.key_tail),
            *(self.sinks, self.alibi_slopes, self.bias),
        )
        return any(t is not None and t.requires_grad for t in tensors)


def forward_mode() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, forward_ad), which kernels would drop."""
    return forward_ad._current_level >= 0


def check(call: AttentionCall) -> AttentionCall:
    """Return `call`, or raise `ShapeError` on the first thing that does not fit.

    A mask or bias of fewer dims gets leading ones of size 1, as in any broadcasting.
    """
    query = call.query
    require_tensor("query", query, 4)
    batch, heads, query_length, head_dim = query.shape
    _check_kv(call)
    _, kv_heads, context, _, value_dim = call.kv_shape
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"query has {heads} heads and key has {kv_heads}: the query heads must be a multiple "
            "of the kv heads"
        )
    if head_dim == 0 or value_dim == 0:
        raise ShapeError("head dims of 0 are not attention: give D and V of at least 1")
    _check_options(call)
    check_mask_and_bias(call.mask, call.bias, query, (batch, heads, query_length, context))
    for name, per_head in (("sinks", call.sinks), ("alibi_slopes", call.alibi_slopes)):
        if per_head is not None:
            require_tensor(name, per_head, 1)
            if per_head.shape[0] != heads or per_head.device != query.device:
                raise ShapeError(
                    f"{name} has shape {list(per_head.shape)} on {per_head.device}, expected "
                    f"[{heads}] (one per query head) on {query.device}"
                )
    if call.kv_lengths is not None:
        require_lengths(call.kv_lengths, batch, context, query.device)
    if any(extra is not None and extra.ndim < 4 for extra in (call.mask, call.bias)):
        return replace(call, mask=_four_dims(call.mask), bias=_four_dims(call.bias))
    return call


def _four_dims(extra: Tensor | None) -> Tensor | None:
    return None if extra is None else extra[(None,) * (4 - extra.ndim)]


def keys_and_values(
    first: Any, second: Any, kv: Any, kv_lengths: Tensor | None, names: str
) -> tuple[Any, Any, Tensor | None]:
    """The two tensors of a call and its lengths: as given, or of the view `kv`.

    Raises:
        ShapeError: both or neither were given.
    """
    if kv is None:
        if first is None or second is None:
            raise ShapeError(f"give {names}, or kv=, a view of a cache")
        return first, second, kv_lengths
    if not isinstance(kv, KV):
        raise ShapeError(f"kv is a {type(kv).__name__}, expected a PagedKV or a QuantKV")
    if first is not None or second is not None:
        raise ShapeError(f"kv= stands for {names}: give either the one or the others")
    if kv.lengths is not None and kv_lengths is not None:
        raise ShapeError("kv has lengths of its own: leave kv_lengths out")
    return kv.key, kv.value, kv_lengths if kv.lengths is None else kv.lengths


def _check_kv(call: AttentionCall) -> None:
    """Raise `ShapeError` unless keys and values fit one another."""
    query, key, value = call.query, call.key, call.value
    if call.kv is not None:
        require_like(query)
        call.kv.check(query)
        _check_key(list(call.kv_shape[:4]), query)
        return
    for name, tensor in (("key", key), ("value", value)):
        require_tensor(name, tensor, 4)
    require_like(query, key=key, value=value)
    _check_key(list(key.shape), query)
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            f"value has shape {list(value.shape)}, expected [B, K, L, V] with the same B, K and L "
            f"as key {list(key.shape)}"
        )


def _check_key(shape: list[int], query: Tensor) -> None:
    batch, _, _, head_dim = query.shape
    if shape[0] != batch or shape[3] != head_dim:
        raise ShapeError(
            f"key has shape {shape}, expected [B, K, L, D] with B={batch} and D={head_dim} as in "
            f"query {list(query.shape)}"
        )


def require_tensor(name: str, tensor: Any, ndim: int) -> None:
    """Raise `ShapeError` unless `tensor` is a tensor of `ndim` dims."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided:
        raise ShapeError(f"{name} has layout {tensor.layout}, expected a dense tensor")
    if tensor.ndim != ndim:
        raise ShapeError(f"{name} has shape {list(tensor.shape)}, expected {ndim} dims")


def require_like(query: Tensor, **others: Tensor) -> None:
    """Raise `ShapeError` unless every tensor has the query's dtype and device."""
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ShapeError(f"query has dtype {query.dtype}, expected one of {names}")
    for name, tensor in others.items():
        if tensor.dtype != query.dtype:
            raise ShapeError(
                f"{name} has dtype {tensor.dtype} and query {query.dtype}: convert one, as "
                f"{name}.to(query.dtype)"
            )
        if tensor.device != query.device:
            raise ShapeError(f"{name} is on {tensor.device} and query on {query.device}")


def _check_options(call: AttentionCall) -> None:
    if not _is_number(call.scale):
        raise ShapeError(f"scale is {call.scale!r}, expected a finite number")
    if call.window is not None:
        whole = isinstance(call.window, int) and not isinstance(call.window, bool)
        if not whole or not 1 <= call.window < 2**63:
            raise ShapeError(f"window is {call.window!r}, expected an int of at least 1")
        if not call.causal:
            raise ShapeError("window needs causal=True: give a symmetric window as a mask")
    if call.softcap is not None and not (_is_number(call.softcap) and call.softcap > 0):
        raise ShapeError(f"softcap is {call.softcap!r}, expected a finite number above 0")


def _is_number(value: Any) -> bool:
    # float and int first: asking an abstract class takes a microsecond
    return isinstance(value, (float, int, Real)) and -math.inf < float(value) < math.inf


def check_mask_and_bias(mask: Any, bias: Any, query: Tensor, full: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless both are None or fit `full`, [B,H,S,L], on the query's device."""
    for name, extra in (("mask", mask), ("bias", bias)):
        if extra is not None:
            _check_broadcast(name, extra, query, full)
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(
            f"mask has dtype {mask.dtype}, expected torch.bool (True = attend): pass an "
            "additive float mask as bias="
        )
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(f"bias has dtype {bias.dtype}, expected a floating dtype")


def _check_broadcast(name: str, tensor: Any, query: Tensor, full: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    # from the last dim on: there may be fewer, and not more
    sizes = zip(reversed(tensor.shape), reversed(full), strict=False)
    if tensor.ndim > 4 or not all(size in (1, whole) for size, whole in sizes):
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}, expected one that broadcasts to "
            f"[B, H, S, L] = {list(full)}"
        )
    if tensor.device != query.device:
        raise ShapeError(f"{name} is on {tensor.device} and query on {query.device}")


def require_lengths(kv_lengths: Any, batch: int, context: int, device: torch.device) -> None:
    """Raise `ShapeError` unless `kv_lengths` is one length of 0 to `context` per sequence."""
    require_tensor("kv_lengths", kv_lengths, 1)
    if kv_lengths.shape[0] != batch or kv_lengths.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"kv_lengths has shape {list(kv_lengths.shape)} and dtype {kv_lengths.dtype}, expected "
            f"[{batch}] (one per sequence) of int32 or int64"
        )
    if kv_lengths.device != device:
        raise ShapeError(f"kv_lengths is on {kv_lengths.device} and query on {device}")
    # on other devices reading the values would stall the queue
    if device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(kv_lengths.min()), int(kv_lengths.max())
        if low < 0 or high > context:
            raise ShapeError(
                f"kv_lengths run from {low} to {high}, expected 0 to L={context}, the keys given"
            )
