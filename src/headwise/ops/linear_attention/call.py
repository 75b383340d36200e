"""One call of linear attention: its tensors, checked, and what all of its forms share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import ShapeError
from headwise.ops.attend.call import is_number
from headwise.ops.attend.checks import require_lengths, require_like, require_tensor


@dataclass(slots=True, eq=False)
class LinearCall:
    """query, key [B,K,S,D], value [B,H,S,V]; decay [H], [B,H,S] or [B,H,S,D]; beta [B,H,S].

    Those that stand in for functions of others give more: norm is added to the squared lengths by
    which queries and keys are divided; a transposed state is [B,H,V,D]; one in place is changed
    where it is.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    beta: Tensor | None
    scale: float
    state: Tensor | None
    lengths: Tensor | None = None
    norm: float | None = None
    transposed: bool = False
    in_place: bool = False

    @property
    def exact(self) -> torch.dtype:
        """What states are held and sums are made in."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Both in full precision, normed, and for each head of values: [B,H,S,D]."""
        group, both = self.value.shape[1] // self.key.shape[1], []
        for given in (self.query, self.key):
            rows = given.to(self.exact)
            if self.norm is not None:
                rows = rows * (rows.square().sum(dim=-1, keepdim=True) + self.norm).rsqrt()
            both.append(rows if group == 1 else rows.repeat_interleave(group, dim=1))
        return both[0], both[1]

    def first_state(self) -> Tensor:
        """The state before the first token, [B,H,D,V]; a new tensor where there was none."""
        if self.state is not None:
            state = self.state.to(self.exact)
            return state.transpose(2, 3) if self.transposed else state
        batch, heads, _, value_dim = self.value.shape
        return self.value.new_zeros(batch, heads, self.key.shape[3], value_dim, dtype=self.exact)

    def last_state(self, state: Tensor) -> Tensor:
        """What is given back for the state [B,H,D,V] after the last token."""
        if self.transposed:
            state = state.transpose(2, 3)
        if self.state is None:
            return state.contiguous()
        if self.in_place:
            return self.state.copy_(state)
        # never the one that was given
        return state.clone() if self.query.shape[2] == 0 else state.contiguous()

    def decay_of(self, dtype: torch.dtype) -> Tensor | None:
        """The logarithms of what the state is multiplied by before each token, [B,H,S,D|1]."""
        if self.decay is None:
            return None
        decay = self.decay.to(dtype)
        if decay.ndim == 1:
            batch, _, length, _ = self.value.shape
            return decay.view(1, -1, 1, 1).expand(batch, -1, length, 1)
        return decay.unsqueeze(-1) if decay.ndim == 3 else decay


def check(call: LinearCall) -> None:
    """Raise `ShapeError` on the first thing that does not fit."""
    query, key, value = call.query, call.key, call.value
    if not is_number(call.scale):
        raise ShapeError(f"scale is {call.scale!r:.60}, expected a finite number")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, tensor, 4)
    require_like(query, key=key, value=value)
    batch, kv_heads, length, dim = query.shape
    heads = value.shape[1]
    if key.shape != query.shape:
        raise ShapeError(
            f"key has shape {list(key.shape)}, expected {list(query.shape)} as query: a token has "
            "one of each"
        )
    if value.shape[0] != batch or value.shape[2] != length:
        raise ShapeError(
            f"value has shape {list(value.shape)}, expected [B, H, S, V] with B={batch} and "
            f"S={length} as in query {list(query.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"value has {heads} heads and key has {kv_heads}: the heads of values must be a "
            "multiple of those of keys"
        )
    if dim == 0 or value.shape[3] == 0:
        raise ShapeError("head dims of 0 are not attention: give D and V of at least 1")
    full = (batch, heads, length, dim)
    if call.decay is not None:
        _require("decay", call.decay, ([heads], list(full[:3]), list(full)), query)
    if call.beta is not None:
        _require("beta", call.beta, (list(full[:3]),), query)
    if call.state is not None:
        _require("state", call.state, ([batch, heads, dim, value.shape[3]],), query)
    if call.lengths is not None:
        require_lengths(call.lengths, batch, length, query.device, "lengths")


def _require(name: str, tensor: Any, shapes: tuple[list[int], ...], query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    fits = list(tensor.shape) in shapes and tensor.is_floating_point()
    if not fits or tensor.device != query.device:
        expected = " or ".join(map(str, shapes))
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}, "
            f"expected {expected} of a floating dtype on {query.device}"
        )
