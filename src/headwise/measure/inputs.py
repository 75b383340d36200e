"""The tensors of a shape, in so many copies that none is in the processor's cache at its turn.

A decoding step of a model finds its keys and values in memory: the weights and the other layers
went through the cache since. A benchmark that reads one tensor again and again would time the
cache.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import headwise.ops as ops
from headwise.base.memory import available_bytes, gib
from headwise.errors import CapacityError
from headwise.measure.environment import last_level_cache
from headwise.measure.shape import Shape

# Where the system does not say how large the last-level cache is; larger than most.
ASSUMED_CACHE = 256 * 2**20
# Of the free memory, what the copies may take at most.
_MEMORY_SHARE = 4
# Of a small call, more copies would take longer to make than to time.
_MOST_COPIES = 2048


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One call of an operator on random tensors.

    Of `headwise.attention` the queries are query [B,H,S,D], stored are key [B,K,L,D] and value
    [B,K,L,V]; of `headwise.latent_attention` query_nope [B,H,S,N] and query_rope [B,H,S,P], latent
    [B,L,R] and key_rope [B,L,P], and the weights w_uk [H,N,R] and w_uv [H,V,R]. L is the longest
    length.

    kv_lengths [B] for ragged shapes. `mask` [B|1,1,S,L] (True = attend) is the same rule for
    operators without lengths: None where every query sees every key, or the rule is SDPA's own
    `is_causal`. `joined` [B,1,L,R+P] is latent and rope key in one tensor, as operators of one key
    need them.
    """

    shape: Shape
    queries: tuple[Tensor, ...]
    stored: tuple[Tensor, Tensor]
    weights: tuple[Tensor, ...]
    kv_lengths: Tensor | None
    mask: Tensor | None
    joined: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which the operator gets them."""
        return (*self.queries, *self.stored, *self.weights)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """What a cache holds: [B,K,L,D] and [B,K,L,V], or [B,1,L,R] and [B,1,L,P]."""
        first, second = self.stored
        return (first.unsqueeze(1), second.unsqueeze(1)) if self.shape.latent else self.stored

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.queries[0].device

    def with_rows(self, first: Tensor, second: Tensor) -> "Inputs":
        """The same call on other `rows`."""
        stored = (first.squeeze(1), second.squeeze(1)) if self.shape.latent else (first, second)
        return replace(self, stored=stored)

    def attend(self, backend: str | None = None, kv: ops.KV | None = None) -> Tensor:
        """What headwise makes of it, [B,H,S,V]; with `kv` on a cache that holds its `rows`."""
        options: dict[str, Any] = {"causal": True, "kv_lengths": self.kv_lengths}
        options |= {"backend": backend, "kv": kv}
        tensors = (*self.queries, *self.stored) if kv is None else self.queries
        if not self.shape.latent:
            return ops.attention(*tensors, **options)
        w_uk, w_uv = self.weights
        options |= {"w_uk": w_uk, "w_uv": w_uv, "paradigm": "absorbed"}
        out = ops.latent_attention(*tensors, **options)
        assert isinstance(out, Tensor)
        return out

    def hidden(self) -> Tensor | None:
        """The keys that each query does not see, [B|1,1,S,L]; None where every query sees all."""
        if self.mask is not None:
            return ~self.mask
        queries = self.shape.query_length
        if queries == 1:
            return None
        # without a mask several queries are as many as keys (see `_mask`)
        square = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=self.device)
        return square.triu(1)

    def explain(self) -> ops.Explanation:
        """Which of headwise's backends runs it, and how."""
        shape = self.shape
        problem = ops.Problem.of(
            shape.spec.decoded(),
            batch=shape.batch,
            query_length=shape.query_length,
            context=max(shape.lengths),
            dtype=self.queries[0].dtype,
            device=self.device.type,
            ragged=shape.ragged,
            split_key=shape.latent and shape.spec.nope_dim > 0,
        )
        return ops.explain_problem(problem)

    @property
    def cold(self) -> tuple[Tensor, ...]:
        """What a decoding step finds in memory: all but the queries."""
        return (*self.stored, *self.weights, *(() if self.joined is None else (self.joined,)))

    def copy(self) -> "Inputs":
        """The same call in memory of its own, the queries excepted."""
        first, second = self.stored
        weights = tuple(weight.clone() for weight in self.weights)
        joined = None if self.joined is None else self.joined.clone()
        stored = first.clone(), second.clone()
        return replace(self, stored=stored, weights=weights, joined=joined)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Random tensors of a shape, with scores of about unit spread.

    >>> from headwise.measure.shape import parse_shape
    >>> make_inputs(parse_shape("decode:6/2:d8:32"), torch.bfloat16).rows[0].shape
    torch.Size([1, 2, 32, 8])
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul_(scale).to(device, dtype)

    spec, batch, queries = shape.spec, shape.batch, shape.query_length
    longest, joined = max(shape.lengths), None
    weights: tuple[Tensor, ...] = ()
    query_dims: tuple[int, ...] = (spec.head_dim,)
    if shape.latent:
        rank, rope = spec.cache_rows.dims
        query_dims, sizes = (spec.nope_dim, rope), (spec.nope_dim, spec.value_dim)
        stored = random(batch, longest, rank), random(batch, longest, rope)
        joined = torch.cat(stored, dim=-1).unsqueeze(1)
        weights = tuple(random(spec.heads, size, rank, scale=rank**-0.5) for size in sizes)
    else:
        rows = batch, spec.kv_heads, longest
        stored = random(*rows, spec.head_dim), random(*rows, spec.value_dim)
    return Inputs(
        shape=shape,
        queries=tuple(random(batch, spec.heads, queries, dim) for dim in query_dims),
        stored=stored,
        weights=weights,
        kv_lengths=torch.tensor(shape.lengths, device=device) if shape.ragged else None,
        mask=_mask(shape, device),
        joined=joined,
    )


def _mask(shape: Shape, device: torch.device | str) -> Tensor | None:
    """Which keys each query sees, [B|1,1,S,L]; None where no mask is needed (see `Inputs`)."""
    queries = shape.query_length
    if not shape.ragged and queries in (1, shape.context):
        return None
    lengths = torch.tensor(shape.lengths if shape.ragged else shape.lengths[:1])
    last = lengths.view(-1, 1, 1, 1) - queries + torch.arange(queries).view(1, 1, -1, 1)
    return (torch.arange(max(shape.lengths)) <= last).to(device)


@dataclass(frozen=True)
class Cold:
    """Copies of one call's inputs, handed out in turn.

    `bytes` is what all copies hold of the tensors that are read from memory, `cache` the size of
    the last-level cache, `assumed` whether that size is a guess.
    """

    copies: tuple[Inputs, ...]
    bytes: int
    cache: int
    assumed: bool

    @property
    def cold(self) -> bool:
        """Whether all copies together exceed the last-level cache."""
        return self.bytes > self.cache

    def note(self) -> str:
        """What there is to say about the cache: "" where it was cold and its size is known."""
        size = f"{gib(self.bytes)} of copies, last-level cache {gib(self.cache)}"
        if self.assumed:
            size += " (assumed)"
        if not self.cold:
            return f"caches not cold: {size}"
        return f"cold caches: {size}" if self.assumed else ""


def make_cold(inputs: Inputs, *, cache: int | None = None, memory: int | None = None) -> Cold:
    """Copy inputs until they hold twice the last-level cache, within a quarter of the free memory.

    Twice, because a cache does not always evict what is oldest. `cache` and `memory` are in bytes,
    by default this machine's last-level cache and the free memory of the inputs' device.
    """
    known = last_level_cache() if cache is None else cache
    size = known or ASSUMED_CACHE
    free = available_bytes(inputs.device) if memory is None else memory
    one = sum(tensor.nbytes for tensor in inputs.cold)
    count = max(1, min(math.ceil(2 * size / one), free // _MEMORY_SHARE // one, _MOST_COPIES))
    copies = (inputs, *(inputs.copy() for _ in range(count - 1)))
    return Cold(copies, count * one, size, known is None)


def check_fits(shape: Shape, dtype: torch.dtype) -> None:
    """Refuse a shape of which one copy takes more than a quarter of the free memory.

    Raises:
        CapacityError: says the needed and the available bytes.
    """
    needed = shape.batch * max(shape.lengths) * shape.spec.cache_elements_per_token * dtype.itemsize
    free = available_bytes(torch.device("cpu"))
    if needed > free // _MEMORY_SHARE:
        raise CapacityError(
            f"shape {shape} needs {gib(needed)} for one copy of its cache, more than a quarter of "
            f"the {gib(free)} of memory available; give a shorter context or a smaller batch"
        )
