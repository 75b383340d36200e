"""The gated delta rule and Kimi delta attention, as their files call them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.hf.linear.function import Function, Random, is_packed
from headwise.ops import LinearCall, change_state

# The files' functions norm with it.
_NORM = 1e-6


def _ours(stock: Callable[..., Any]) -> Callable[..., Any]:
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
    ) -> Any:
        if is_packed(others):
            return stock(
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
        dtype = query.dtype
        if dtype == torch.float64 or key.dtype != dtype or value.dtype != dtype:
            query, key, value = query.float(), key.float(), value.float()
        call = LinearCall(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            decay=g.transpose(1, 2),
            beta=beta.transpose(1, 2),
            scale=query.shape[-1] ** -0.5,
            state=initial_state,
            norm=_NORM if use_qk_l2norm_in_kernel else None,
            # a state that is asked for is the cache's, and goes back to where it is
            in_place=output_final_state,
        )
        out, state = change_state(call)
        return out.transpose(1, 2).to(dtype), state if output_final_state else None

    return run


# Heads of a trial, their dims, and tokens for more than a chunk.
_HEADS, _DIM, _VALUE, _MANY = 2, 8, 6, 70


def _function(name: str, *, tokens: int, grouped: bool, each: bool) -> Function:
    """grouped: queries may have fewer heads than values; each: a decay of every dim of a key."""

    def tried(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        random, heads = Random(), _HEADS if grouped else 2 * _HEADS
        rows = (1, tokens, 2 * _HEADS)
        given = [random(1, tokens, heads, _DIM) for _ in range(2)]
        given += [random(*rows, _VALUE), -(random(*rows, _DIM) if each else random(*rows)).abs()]
        given += [random(*rows).sigmoid()]
        found: tuple[Tensor, ...] = function(
            **dict(zip(("query", "key", "value", "g", "beta"), given, strict=True)),
            initial_state=random(1, 2 * _HEADS, _DIM, _VALUE),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return found

    return Function(name, _ours, tried)


GATED_DELTA = (
    _function("torch_chunk_gated_delta_rule", tokens=_MANY, grouped=True, each=False),
    _function("torch_recurrent_gated_delta_rule", tokens=1, grouped=True, each=False),
)
KIMI_DELTA = (
    _function("chunk_kimi_delta_attention", tokens=_MANY, grouped=False, each=True),
    _function("recurrent_kimi_delta_attention", tokens=1, grouped=False, each=True),
)
