"""The output projection, fitted again to what brings hidden states back to the original's.

After keys and values have changed, the heads' outputs z still determine most of what is wanted
of them, y: W_o is the ridge solution of W_o z = y, drawn to the projection that was folded. How
strongly is chosen by how well one half of the text predicts the other.
"""

import torch
from torch import Tensor

# In units of the mean energy of z.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# So many of the outputs are enough to choose by.
_OUTPUTS = 256


class Refit:
    """Sums over batches of heads' outputs z [.., H*V] and wanted outputs y [.., E].

    Batches go to the two halves in turn; a single batch is one half, and then the middle ridge is
    taken.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = torch.zeros(2, inputs, inputs)
        self.cross = torch.zeros(2, inputs, outputs)
        self.batches = 0

    def add(self, heads: Tensor, wanted: Tensor) -> None:
        """Count a batch."""
        rows, half = heads.flatten(0, -2), self.batches % 2
        self.gram[half] += rows.T @ rows
        self.cross[half] += rows.T @ wanted.flatten(0, -2)
        self.batches += 1

    def solve(self, start: Tensor) -> Tensor:
        """W_o [E, H*V] near `start`."""
        return self.solved(start, self.chosen(start), self.gram.sum(0), self.cross.sum(0))

    def chosen(self, start: Tensor) -> float:
        """The ridge with which each half predicts the other best."""
        if self.batches < 2:
            return _RIDGES[len(_RIDGES) // 2]
        errors, step = [], -(-len(start) // _OUTPUTS)
        start, cross = start[::step], self.cross[..., ::step]
        for ridge in _RIDGES:
            error = 0.0
            for half in range(2):
                weight = self.solved(start, ridge, self.gram[half], cross[half])
                # |W z - y|^2 over the other half, less |y|^2
                other = self.gram[1 - half] @ weight.T - 2 * cross[1 - half]
                error += float((weight.T * other).sum())
            errors.append(error)
        return _RIDGES[errors.index(min(errors))]

    @staticmethod
    def solved(start: Tensor, ridge: float, gram: Tensor, cross: Tensor) -> Tensor:
        """The minimum of |W z - y|^2 + ridge mean|z|^2 |W - start|^2 over the rows summed."""
        weight = ridge * gram.diagonal().mean()
        if not weight > 0:  # heads that put out nothing say nothing
            return start
        left = gram + weight * torch.eye(len(gram))
        right = cross + weight * start.T
        factor = torch.linalg.cholesky(left.double())
        return torch.cholesky_solve(right.double(), factor).float().T.contiguous()
