"""The norm of the modules here."""

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """PyTorch's, computed in the dtype of its weight: under autocast it stays in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] with a root mean square of 1, times the weight."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))
