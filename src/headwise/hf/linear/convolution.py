"""The short convolution before linear attention, as the files call it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from headwise.hf.linear.function import Function, Random, is_packed
from headwise.ops import CONV_ACTIVATIONS, ConvolutionCall, convolve


def _many(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> Any:
        known = activation in CONV_ACTIVATIONS and weight.dtype == hidden_states.dtype
        if not known or is_packed(others):
            return stock(hidden_states, weight, bias, activation, **others)
        call = ConvolutionCall(hidden_states, weight, bias, activation, None, None, kept=0)
        return convolve(call)[0]

    return run


def _one(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> Any:
        same = weight.dtype == hidden_states.dtype == conv_state.dtype
        if (
            not same
            or activation not in CONV_ACTIVATIONS
            or conv_state.shape[2] < weight.shape[1] - 1
        ):
            return stock(hidden_states, conv_state, weight, bias, activation, **others)
        kept = conv_state.shape[2]
        call = ConvolutionCall(
            hidden_states, weight, bias, activation, conv_state, None, kept, in_place=True
        )
        return convolve(call)[0]

    return run


_CHANNELS, _WIDTH, _TOKENS = 6, 4, 9


def _try_many(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    random = Random()
    out: Tensor = function(
        random(1, _TOKENS, _CHANNELS).transpose(1, 2),
        random(_CHANNELS, _WIDTH),
        random(_CHANNELS),
        activation="silu",
    )
    return (out,)


def _try_one(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    random = Random()
    state = random(1, _CHANNELS, _WIDTH)
    out: Tensor = function(
        random(1, _CHANNELS, 1), state, random(_CHANNELS, _WIDTH), None, activation="silu"
    )
    return out, state


CONVOLUTION = (
    Function("causal_conv1d_fn", _many, _try_many),
    Function("causal_conv1d_update", _one, _try_one),
)
