"""`causal_conv1d`: each channel over its last inputs, which are its state."""

from torch import Tensor

from headwise.ops.backend import offer_of
from headwise.ops.convolution.call import ConvolutionCall, check


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up the last inputs of each channel, as stands before linear attention.

    out_t = activation(bias + sum over j of weight[:, j] x_(t - W + 1 + j)); inputs before the first
    are those of `state`, or 0.

    Example:
        >>> import torch, headwise
        >>> x, weight = torch.randn(1, 48, 20), torch.randn(48, 4)  # [B, C, S], [C, W]
        >>> whole, last = headwise.causal_conv1d(x, weight, activation="silu")
        >>> first, state = headwise.causal_conv1d(x[:, :, :13], weight, activation="silu")
        >>> rest, state = headwise.causal_conv1d(
        ...     x[:, :, 13:], weight, activation="silu", state=state
        ... )
        >>> torch.allclose(torch.cat([first, rest], dim=2), whole, atol=1e-6)
        True

    Args:
        x: [B, C, S], in float32, bfloat16, float16 or float64, in any layout; channels that lie
            side by side are read as they are.
        weight: [C, W].
        bias: [C].
        activation: None, or "silu".
        state: [B, C, N], the last inputs of the tokens before, at least W - 1 of them.
        lengths: [B] int, the tokens of each sequence; at or past its length a token changes
            nothing, and gives 0.
        backend: the name of the backend to force.

    Returns:
        out [B, C, S], and the last N inputs: W of them where no state was given, as Transformers
        keeps. Both have gradients.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: no such backend.

    Source: H3 (arXiv 2212.14052), where it stands before a state; as in Mamba-2 (2405.21060).
    """
    kept = 0
    if isinstance(state, Tensor) and state.ndim == 3:
        kept = state.shape[2]
    elif isinstance(weight, Tensor) and weight.ndim == 2:
        kept = weight.shape[1]
    call = ConvolutionCall(x, weight, bias, activation, state, lengths, kept)
    check(call)
    return convolve(call, backend)


def convolve(call: ConvolutionCall, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """out [B, C, S] and the last inputs of a call whose tensors fit."""
    out, after = offer_of("causal_conv1d", backend, call)(call)
    return out, after
