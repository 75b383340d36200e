"""What is not chosen counts by its mean: the rest of attention to chosen keys."""

import torch
from torch import Tensor


def add_rest(out: Tensor, rest: Tensor, means: Tensor) -> Tensor:
    """(1 - rest) out + rest means, as if every key that was not chosen had the mean of all values.

    >>> out, means = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 1, 4)
    >>> add_rest(out, torch.tensor([[[0.25], [0.0]]]), means)[0, :, 0, 0]
    tensor([0.7500, 1.0000])

    Args:
        out: [B, H, S, V], attention to the chosen keys.
        rest: [B, H, S], of `choose_keys`.
        means: [B, K, S, V], of the values that each query could see.

    Source: SparQ Attention, arXiv 2312.04985, section 3.
    """
    share = rest.unsqueeze(-1).float()
    each = means.float().repeat_interleave(out.shape[1] // means.shape[1], dim=1)
    return torch.lerp(out.float(), each, share).to(out.dtype)


def means_of(value: Tensor, queries: int, sums: Tensor | None = None, summed: int = 0) -> Tensor:
    """The mean of all values up to each of the last queries, float32 [B, K, S, V].

    >>> means_of(torch.arange(4.0).view(1, 1, 4, 1), 2).flatten()
    tensor([1.0000, 1.5000])

    Args:
        value: [B, K, L, V], those behind the first `summed`.
        queries: S, at most L.
        sums: [B, K, V], of the values of the first `summed` tokens.
        summed: how many those are.
    """
    wide = value.float()
    before = wide.shape[2] - queries
    first = wide[:, :, :before].sum(dim=2, keepdim=True)
    if sums is not None:
        first = first + sums.unsqueeze(2)
    counts = torch.arange(queries, device=value.device) + (summed + before + 1)
    return (first + wide[:, :, before:].cumsum(dim=2)) / counts[:, None]


def means_under(mask: Tensor, value: Tensor) -> Tensor:
    """The mean of the values [B, K, L, V] that a mask [B|1, 1, S, L] shows, float32 [B, K, S, V].

    >>> mask = torch.tensor([[[[True, False, True]]]])
    >>> means_under(mask, torch.arange(3.0).view(1, 1, 3, 1)).item()
    1.0
    """
    return (mask.float() @ value.float()) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
