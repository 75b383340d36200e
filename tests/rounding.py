"""How far a whole model in half precision may be from float32."""

import torch


def half_precision_error(dtype: torch.dtype, layers: int) -> float:
    """The largest root mean square of the error of logits, over that of the logits.

    A layer rounds some hundred times on the way (projections, norms, scores, weights, sums), each
    time by half an eps at most; what is independent adds up as squares.
    """
    return (100 * layers) ** 0.5 * torch.finfo(dtype).eps / 2


def relative_error(given: torch.Tensor, exact: torch.Tensor) -> float:
    """The root mean square of the error over that of what is exact."""
    return float((given.double() - exact.double()).norm() / exact.double().norm())
