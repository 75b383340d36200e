"""Attention to parts of a context, put together: the parts of a split, or of one read twice."""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.checks import DTYPES, require_per_head, require_tensor


def merge_attention(
    out: Tensor, lse: Tensor, *, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The attention to all keys, exactly, of the attention to N parts of them.

    Example:
        >>> import torch, headwise
        >>> query = torch.randn(1, 4, 1, 16)
        >>> key, value = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
        >>> parts = [
        ...     headwise.attention(query, key[:, :, own], value[:, :, own], return_lse=True)
        ...     for own in (slice(0, 30), slice(30, 50))
        ... ]
        >>> out, lse = headwise.merge_attention(*(torch.stack(each) for each in zip(*parts)))
        >>> torch.allclose(out, headwise.attention(query, key, value), atol=1e-5)
        True

    Args:
        out: [N, B, H, S, V], what `attention` gives for each part of the keys, without sinks.
        lse: [N, B, H, S], float32 or float64, its natural log-sum-exp. A part of which a query
            sees nothing is 0, and -inf.
        sinks: [H], as in `attention`: they count once, and so here.

    Returns:
        out [B, H, S, V] in the dtype of the parts, summed in the lse's; and lse [B, H, S].

    Raises:
        ShapeError: shapes or dtypes that do not fit together.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1, over V columns.
    """
    _check(out, lse, sinks)
    peak = lse.amax(dim=0)
    if sinks is not None:
        sink = sinks.to(lse.dtype).view(1, -1, 1)
        peak = torch.maximum(peak, sink)
    # a row that sees nothing anywhere: 0 and -inf, not NaN
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)
    share = torch.exp(lse - peak)
    total = share.sum(dim=0)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    whole = (share.unsqueeze(-1) * out.to(lse.dtype)).sum(dim=0)
    merged = whole / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return merged.to(out.dtype), peak + torch.log(total)


def _check(out: Any, lse: Any, sinks: Any) -> None:
    require_tensor("out", out, 5)
    require_tensor("lse", lse, 4)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    if lse.shape != out.shape[:4] or not len(out) or lse.device != out.device:
        raise ShapeError(
            f"lse has shape {list(lse.shape)} on {lse.device}, expected {list(out.shape[:4])} on "
            f"{out.device}, the N, B, H and S of out, with N of at least 1"
        )
    if out.dtype not in DTYPES or lse.dtype != wide:
        raise ShapeError(
            f"out has dtype {out.dtype} and lse {lse.dtype}, expected what attention returns: "
            "float32, or float64 for an out of float64"
        )
    if sinks is not None:
        require_per_head("sinks", sinks, out.shape[2], out)
