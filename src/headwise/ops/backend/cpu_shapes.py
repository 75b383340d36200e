"""Shapes and dtypes that the native operators return, for the compiler and fake tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.ops.integers.rounding import INT4_GROUP
from headwise.ops.packed.formats import packed_columns


def register_shapes() -> None:
    """Tell PyTorch, once the library is loaded."""
    for function in (
        *(_attend, _linear, _experts, _norm, _mlp, _project, _quantize, _pack, _unpack),
        *(
            _index_topk,
            _choose_keys,
            _top_keys,
            _linear_attention,
            _linear_attention_,
            _causal_conv1d,
            _causal_conv1d_,
        ),
        *(_attention_inputs, _layer_attention, _layer_outputs, _attention_outputs),
    ):
        torch.library.register_fake(f"headwise::{function.__name__[1:]}", _on_one_device(function))


def _on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of shapes that refuses tensors with memory beside others without."""

    def checked(x: Tensor, *arguments: Any) -> Any:
        for each in arguments:
            for tensor in each if isinstance(each, list | tuple) else (each,):
                if isinstance(tensor, Tensor) and tensor.device != x.device:
                    raise RuntimeError(
                        f"headwise::{function.__name__[1:]}: tensors on {x.device} and "
                        f"{tensor.device}, expected one device"
                    )
        return function(x, *arguments)

    return checked


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tail: Tensor | None,
    key_tail: Tensor | None,
    page_table: Tensor | None,
    context: int,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    key_tail_scales: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    return_lse: bool,
    level: int,
    *options: object,
) -> tuple[Tensor, Tensor]:
    # two integers of 4 bits lie in a byte
    value_dim = value.shape[3] * (2 if value.dtype == torch.uint8 else 1)
    out = query.new_empty(*query.shape[:3], value_dim)
    lse = query.new_empty(query.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return out, lse


def _linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], level: int
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _experts(x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None, level: int) -> Tensor:
    return x.new_empty(*chosen.shape, weight.shape[1])


def _norm(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _mlp(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _attention_inputs(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, dim = arguments[6:9]
    key, value = (x.new_empty(x.shape[0], kv_heads, x.shape[1], dim) for _ in range(2))
    return x.new_empty(x.shape[0], heads, x.shape[1], dim), key, value


def _layer_attention(x: Tensor, *arguments: Any) -> Tensor:
    heads, _, dim = arguments[6:9]
    return x.new_empty(x.shape[0], x.shape[1], heads, dim)


def _layer_outputs(x: Tensor, attended: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _attention_outputs(x: Tensor, attended: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _project(x: Tensor, weight: Tensor, up: bool, level: int) -> Tensor:
    return x.new_empty(*x.shape[:3], weight.shape[2 if up else 1])


def _index_topk(
    query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None, causal: bool, top: int, *_: Any
) -> Tensor:
    return query.new_empty(*query.shape[:2], top, dtype=torch.int32)


def _top_keys(query: Tensor, key: Tensor, mask: Tensor | None, top: int, level: int) -> Tensor:
    return query.new_empty(*query.shape[:3], top, dtype=torch.int32)


def _choose_keys(query: Tensor, keys: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    most, rest = arguments[-3], query.new_empty(query.shape[:3], dtype=torch.float32)
    chosen = query.new_empty(
        *query.shape[:1], keys.shape[1], query.shape[2], most, dtype=torch.int32
    )
    return chosen, rest


def _linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    transposed = arguments[-2]
    sizes = (value.shape[3], key.shape[3]) if transposed else (key.shape[3], value.shape[3])
    state = query.new_empty(*value.shape[:2], *sizes, dtype=torch.float32)
    return _linear_attention_(query, key, value), state


def _linear_attention_(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    batch, heads, length, width = value.shape
    return value.new_empty(batch, length, heads, width).transpose(1, 2)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    lengths: Any,
    kept: int,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    return _causal_conv1d_(x), x.new_empty(*x.shape[:2], kept)


def _causal_conv1d_(x: Tensor, *arguments: Any) -> Tensor:
    batch, channels, length = x.shape
    if channels == 1 or x.stride(1) == 1:
        return x.new_empty(batch, length, channels).transpose(1, 2)
    return x.new_empty(batch, channels, length)


def _pack(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape if order is None else (*order.shape, *rows.shape[1:]))


def _unpack(packed: Tensor, like: Tensor, rows: Tensor | None, level: int) -> Tensor:
    count = packed.shape[0] if rows is None else rows.shape[0]
    return like.new_empty(count, packed_columns(packed))


def _quantize(rows: Tensor, bits: int, level: int) -> tuple[Tensor, Tensor]:
    groups = 1 if bits == 8 else -(-rows.shape[3] // INT4_GROUP)
    integers = rows.new_empty(
        *rows.shape[:3],
        rows.shape[3] * bits // 8,
        dtype=torch.int8 if bits == 8 else torch.uint8,
    )
    return integers, rows.new_empty(*rows.shape[:3], groups, dtype=torch.float32)
