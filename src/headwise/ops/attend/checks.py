"""Checks of what an operator is given; each raises a `ShapeError` that names the argument."""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.views import KV

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def keys_and_values(
    first: Any, second: Any, kv: Any, kv_lengths: Tensor | None, names: str
) -> tuple[Any, Any, Tensor | None]:
    """The two tensors of a call and its lengths: as given, or of the view `kv`.

    Raises:
        ShapeError: neither the tensors nor a view, or both; lengths beside a view that has its own.
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
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ShapeError(f"query has dtype {dtype}, expected one of {names}")
    for name, tensor in others.items():
        if tensor.dtype != dtype:
            raise ShapeError(
                f"{name} has dtype {tensor.dtype} and query {dtype}: convert one, as "
                f"{name}.to(query.dtype)"
            )
        if tensor.device != device:
            raise ShapeError(f"{name} is on {tensor.device} and query on {device}")


def require_per_head(name: str, tensor: Any, heads: int, query: Tensor) -> None:
    """Raise `ShapeError` unless `tensor` is [heads] on the query's device."""
    require_tensor(name, tensor, 1)
    if tensor.shape[0] != heads or tensor.device != query.device:
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)} on {tensor.device}, expected "
            f"[{heads}] (one per query head) on {query.device}"
        )


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


def check_chosen(
    indices: Any,
    block_indices: Any,
    block_size: Any,
    query: Tensor,
    full: tuple[int, ...],
    kv_heads: int,
) -> None:
    """Raise `ShapeError` unless one of both names keys, or blocks, of `full`, [B,H,S,L]."""
    if indices is not None and block_indices is not None:
        raise ShapeError("indices and block_indices both choose keys: give one of them")
    if (block_indices is None) != (block_size is None):
        raise ShapeError(
            f"block_size is {block_size!r} {'with' if block_indices is not None else 'without'} "
            "block_indices: give both or neither"
        )
    size = 1 if block_size is None else block_size
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
        raise ShapeError(f"block_size is {block_size!r}, expected an int of at least 1")
    name, chosen = (
        ("indices", indices) if block_indices is None else ("block_indices", block_indices)
    )
    require_tensor(name, chosen, 4)
    batch, _, length, context = full
    heads = chosen.shape[1]
    fits = chosen.shape[0] == batch and chosen.shape[2] == length and heads in (1, kv_heads)
    if not fits or chosen.dtype != torch.int32 or chosen.device != query.device:
        raise ShapeError(
            f"{name} has shape {list(chosen.shape)} and dtype {chosen.dtype} on {chosen.device}, "
            f"expected [{batch}, 1 or {kv_heads}, {length}, any] of torch.int32 on {query.device}"
        )
    # on other devices reading the values would stall the queue
    if chosen.numel() and query.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high, last = int(chosen.min()), int(chosen.max()), -(-context // size) - 1
        if low < -1 or high > last:
            what = "keys" if size == 1 else f"blocks of {size} keys"
            raise ShapeError(
                f"{name} run from {low} to {high}, expected -1 (none) to {last}, the {what} given"
            )


def require_lengths(
    kv_lengths: Any, batch: int, context: int, device: torch.device, name: str = "kv_lengths"
) -> None:
    """Raise `ShapeError` unless `kv_lengths` is one length of 0 to `context` per sequence."""
    require_tensor(name, kv_lengths, 1)
    if kv_lengths.shape[0] != batch or kv_lengths.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"{name} has shape {list(kv_lengths.shape)} and dtype {kv_lengths.dtype}, expected "
            f"[{batch}] (one per sequence) of int32 or int64"
        )
    if kv_lengths.device != device:
        raise ShapeError(f"{name} is on {kv_lengths.device} and query on {device}")
    # on other devices reading the values would stall the queue
    if device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(kv_lengths.min()), int(kv_lengths.max())
        if low < 0 or high > context:
            raise ShapeError(
                f"{name} run from {low} to {high}, expected 0 to "
                f"{'L' if name == 'kv_lengths' else 'S'}={context}, the "
                f"{'keys' if name == 'kv_lengths' else 'tokens'} given"
            )


def check_positions(
    positions: Any, context: int, causal: bool, others: dict[str, Tensor | None]
) -> None:
    """Raise `ShapeError` unless these are the positions of `context` keys, one after the other.

    others: options that count from the first key, by name, and have to be None.
    """
    require_tensor("key_positions", positions, 1)
    if positions.shape[0] != context or positions.dtype != torch.int64:
        raise ShapeError(
            f"key_positions has shape {list(positions.shape)} and dtype {positions.dtype}, "
            f"expected [{context}] (one per key) of int64"
        )
    if not causal:
        raise ShapeError("key_positions needs causal=True: without it positions hide nothing")
    beside = next((name for name, option in others.items() if option is not None), None)
    if beside is not None:
        raise ShapeError(f"key_positions beside {beside}: give a mask or a bias in its place")
    if positions.device.type == "cpu" and not bool((positions[1:] > positions[:-1]).all()):
        raise ShapeError("key_positions do not increase: sort the keys by position, each once")
