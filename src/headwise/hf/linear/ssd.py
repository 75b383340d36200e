"""State-space duality (Mamba-2), as its files call it: its states are [B, H, V, D].

Queries are C, keys B, values dt x, decays dt A; D x is added after.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from headwise.hf.linear.function import Function, Random, is_packed
from headwise.ops import LinearCall, change_state


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


def _scanned(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    state: Tensor | None,
    *,
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [B,S,H,V] and the state, of x [B,S,H,V], dt [B,S,H], keys and queries [B,S,K,D]."""
    dt = dt.float()
    call = LinearCall(
        queries.float().transpose(1, 2),
        keys.float().transpose(1, 2),
        (x * dt.unsqueeze(-1)).transpose(1, 2),
        decay=(dt * rate.float()).transpose(1, 2),
        beta=None,
        scale=1.0,
        state=state,
        transposed=True,
        in_place=in_place,
    )
    out, after = change_state(call)
    return out.transpose(1, 2), after


def _chunked(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **others: Any,
    ) -> Any:
        if is_packed(others) or others.get("z") is not None or A.ndim != 1:
            return stock(
                hidden_states,
                dt,
                A,
                B,
                C,
                chunk_size,
                D=D,
                dt_bias=dt_bias,
                initial_states=initial_states,
                dt_softplus=dt_softplus,
                dt_limit=dt_limit,
                return_final_states=return_final_states,
                **others,
            )
        dt = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
        x = hidden_states.float()
        # a state that is asked for is the cache's, and goes back to where it is
        out, after = _scanned(x, dt, A, B, C, initial_states, in_place=return_final_states)
        if D is not None:
            out = out + D[..., None] * x
        return (out, after) if return_final_states else out

    return run


def _same(expanded: Tensor, dims: int) -> Tensor | None:
    """What the last dims of a tensor all are; None where they may differ."""
    for _ in range(dims):
        if expanded.stride(-1) != 0 and expanded.shape[-1] != 1:
            return None
        expanded = expanded[..., 0]
    return expanded


def _recurrent(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **others: Any,
    ) -> Any:
        # of each head, though given for each of its numbers
        steps, rate = _same(dt, 1), _same(A, 2)
        bias = None if dt_bias is None else _same(dt_bias, 1)
        if steps is None or rate is None or (dt_bias is not None and bias is None):
            return stock(
                state,
                hidden_states,
                dt,
                A,
                B,
                C,
                D,
                dt_bias=dt_bias,
                dt_softplus=dt_softplus,
                z=z,
                **others,
            )
        steps = _steps(steps, bias, dt_softplus)
        x = hidden_states.float().unsqueeze(1)
        out, _ = _scanned(x, steps.unsqueeze(1), rate, B.unsqueeze(1), C.unsqueeze(1), state)
        out = out.squeeze(1)
        if D is not None:
            out = out + hidden_states * D
        if z is not None:
            out = out * functional.silu(z)
        return out.to(hidden_states.dtype)

    return run


# Heads of a trial, groups of them, their dims, and tokens for more than a chunk.
_HEADS, _GROUPS, _DIM, _VALUE, _MANY = 4, 2, 8, 6, 70


def _try_chunked(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    random = Random()
    found: tuple[Tensor, ...] = function(
        random(1, _MANY, _HEADS, _VALUE),
        random(1, _MANY, _HEADS),
        -random(_HEADS).abs(),
        random(1, _MANY, _GROUPS, _DIM),
        random(1, _MANY, _GROUPS, _DIM),
        chunk_size=16,
        D=random(_HEADS),
        z=None,
        dt_bias=random(_HEADS),
        initial_states=random(1, _HEADS, _VALUE, _DIM),
        dt_softplus=True,
        dt_limit=(0.1, 1.5),
        return_final_states=True,
    )
    return found


def _try_recurrent(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    random = Random()
    state = random(1, _HEADS, _VALUE, _DIM)
    out: Tensor = function(
        state,
        random(1, _HEADS, _VALUE),
        random(1, _HEADS, 1).expand(-1, -1, _VALUE),
        (-random(_HEADS, 1, 1).abs()).expand(-1, _VALUE, _DIM),
        random(1, _GROUPS, _DIM),
        random(1, _GROUPS, _DIM),
        random(_HEADS, 1).expand(-1, _VALUE),
        z=random(1, _HEADS, _VALUE),
        dt_bias=random(_HEADS, 1).expand(-1, _VALUE),
        dt_softplus=True,
    )
    return out, state


SSD = (
    Function("mamba2_chunk_scan", _chunked, _try_chunked),
    Function("mamba2_selective_state_update", _recurrent, _try_recurrent),
)
