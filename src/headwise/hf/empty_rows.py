"""Rows that may attend to nothing: padding, a hole in the mask, a window that reaches only padding.

Our operator gives 0 there, as SDPA does for a boolean mask. Eager attention hides a key by adding
the lowest number of the dtype to its score, which rounds the score away; where all are hidden the
softmax is of equal numbers: an average over ALL keys, later and unwritten ones too, with gradients
to queries and keys as of any softmax. SDPA does the same where it is given that number in a float
mask, or makes one of a position bias. Such a row may enter a loss (the last one of left padding
predicts the first token), so a model keeps what it had before it was attached.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.hf.stock_names import is_tracing

# The attribute of modules whose config said "eager" before the model was attached.
EAGER = "_headwise_eager"
# A row of a float mask that stays below is empty: beside it a float32 score, or the logarithm of
# how many keys there are, loses digits (1e-4 at this size), and a fused backward pass all of them.
_LOW = -1000.0
# Elements of the scores that exist at a time.
_SCORES = 2**24
# Where a mask of `headwise.hf.masks`, which many layers share, remembers its empty rows.
_SHARED = "_headwise_empty"


def share(mask: Tensor) -> Tensor:
    """Have `mask` looked through once, not once per layer, and again after somebody wrote to it."""
    if not mask.is_inference():  # such a tensor does not count what is written to it
        setattr(mask, _SHARED, [])
    return mask


@dataclass(frozen=True, eq=False)
class EmptyRows:
    """The rows of one call that average all values.

    empty: boolean [B|1, 1|H, S|1], which. mask: as it came, boolean or additive, with L keys. bias:
    [1|B,1|H,1|S,1|L] or None, added before the mask by eager, and by SDPA where nothing is hidden.
    """

    empty: Tensor
    mask: Tensor
    scale: float
    softcap: float | None
    bias: Tensor | None

    def unmasked(self) -> Tensor:
        """The mask to give a kernel: SDPA's backward pass on a CPU goes wrong for such rows."""
        if self.mask.dtype == torch.bool:
            return self.mask
        return self.mask.masked_fill(self.empty.unsqueeze(-1), 0.0)

    def fill(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`out` [B,H,S,V] with the averages in its empty rows; the rest as for `attention`."""
        kv_heads = value.shape[1]
        for rows in self._rows(query, key):
            weight = self._weights(query, key, rows)
            batch, heads, length, context = weight.shape
            packed = weight.reshape(batch, kv_heads, heads // kv_heads * length, context)
            average = (packed @ value).reshape(batch, heads, length, -1)
            out = self._put(out, average, rows)
        return out

    def fill_weights(self, weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """`weights` [B,H,S,L] with those of the averages."""
        for rows in self._rows(query, key):
            weights = self._put(weights, self._weights(query, key, rows), rows)
        return weights

    def _rows(self, query: Tensor, key: Tensor) -> list[Tensor | None]:
        """The rows that are empty in any sequence, in blocks; None for all of them."""
        batch, heads, length, _ = query.shape
        if is_tracing(query):
            return [None]
        if self.empty.shape[2] == 1:
            rows = torch.arange(length, device=query.device)
        else:
            rows = self.empty.flatten(0, 1).any(0).nonzero().squeeze(1)
        return list(rows.split(max(1, _SCORES // (batch * heads * key.shape[2]))))

    def _weights(self, query: Tensor, key: Tensor, rows: Tensor | None) -> Tensor:
        """Eager's weights [B,H,rows,L] where a row is empty; anything finite in the others."""
        query = _part(query, rows)
        batch, heads, length, _ = query.shape
        kv_heads, context = key.shape[1], key.shape[2]
        packed = query.reshape(batch, kv_heads, heads // kv_heads * length, -1)
        score = (packed @ key.transpose(-1, -2)).reshape(batch, heads, length, context)
        score = score * self.scale
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        if torch.is_autocast_enabled(query.device.type):
            # masks are in the dtype of the hidden states there
            score = score.float()
        if self.bias is not None:
            score = score + _part(self.bias, rows)
        if self.mask.dtype == torch.bool:
            score = score + torch.finfo(score.dtype).min
        else:
            score = score + _part(self.mask, rows).masked_fill(
                ~_part(self.empty.unsqueeze(-1), rows), 0.0
            )
        exact = torch.promote_types(score.dtype, torch.float32)
        return torch.softmax(score, dim=-1, dtype=exact).to(query.dtype)

    def _put(self, whole: Tensor, part: Tensor, rows: Tensor | None) -> Tensor:
        empty = _part(self.empty.unsqueeze(-1), rows)
        part = torch.where(empty, part.to(whole.dtype), _part(whole, rows))
        return part if rows is None else whole.index_copy(2, rows, part)


def empty_rows(
    mask: Tensor, *, eager: bool, scale: float, softcap: float | None, bias: Tensor | None
) -> EmptyRows | None:
    """The rows of a call without sinks that average all values; None where there are none.

    mask: [B|1, 1|H, S|1, L], boolean or additive. eager: whether the attention before was eager.
    scale, softcap: as for `attention`. bias: a position bias, [B|1, 1|H, S|1, L|1].
    """
    boolean = mask.dtype == torch.bool
    # of a position bias and a boolean mask, SDPA is given one float mask
    if mask.shape[-1] == 0 or (boolean and not eager and bias is None):
        return None
    if not boolean and not eager and is_tracing(mask):
        # the kernels average such rows too, if with SDPA's gradients
        return None
    empty = _empty(mask, eager)
    if empty is None:
        return None
    if boolean and not eager:
        bias = None  # it is replaced by the lowest number, not added to it
    return EmptyRows(empty, mask, scale, softcap, bias)


def _empty(mask: Tensor, eager: bool) -> Tensor | None:
    """[B|1, 1|H, S|1], the rows of `mask` that are averaged; None where there are none."""
    tracing = is_tracing(mask)
    shared = None if tracing else getattr(mask, _SHARED, None)
    if shared and shared[0] == mask._version:
        return shared[1]
    if mask.dtype == torch.bool:
        empty = ~mask.any(-1)
    else:
        peak = mask.detach().amax(-1)
        empty = peak < _LOW
        if not eager:
            empty = empty & ~torch.isneginf(peak)
    if tracing:
        return empty
    averaged = empty if bool(empty.any()) else None
    if shared is not None:
        shared[:] = mask._version, averaged
    return averaged


def _part(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a tensor [..,S|1,..] that broadcasts."""
    return tensor if rows is None or tensor.shape[2] == 1 else tensor[:, :, rows]
