"""The tensors of a shape, in so many copies that none is in the processor's cache at its turn.

A decoding step of a model finds its keys and values in memory: the weights and the other layers
went through the cache since. A benchmark that reads one tensor again and again would time the
cache.
"""

import math
from dataclasses import dataclass, replace

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
class AttentionInputs:
    """One call of `headwise.attention`.

    query [B,H,S,D], key [B,K,L,D], value [B,K,L,V] with L the longest length; kv_lengths [B] for
    ragged shapes. `mask` [B,1,S,L] (True = attend) is the same rule for operators without it: None
    where every query sees every key, or the rule is SDPA's own `is_causal`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kv_lengths: Tensor | None
    mask: Tensor | None

    def cold(self) -> tuple[str, ...]:
        """The tensors that a decoding step reads from memory."""
        return ("key", "value")

    def attend(self, backend: str | None = None) -> Tensor:
        """What headwise makes of it, [B,H,S,V]."""
        return ops.attention(
            self.query,
            self.key,
            self.value,
            causal=True,
            kv_lengths=self.kv_lengths,
            backend=backend,
        )

    def hidden(self) -> Tensor | None:
        """The keys that each query does not see, [B|1,1,S,L]; None where every query sees all."""
        return _hidden(self.mask, self.query.shape[2])


@dataclass(frozen=True, kw_only=True)
class LatentInputs:
    """One call of `headwise.latent_attention`.

    query_nope [B,H,S,N], query_rope [B,H,S,P], latent [B,L,R], key_rope [B,L,P], w_uk [H,N,R],
    w_uv [H,V,R]; kv_lengths and mask as in `AttentionInputs`. `joined` [B,1,L,R+P] is latent and
    rope key in one tensor, as operators of one key need them.
    """

    query_nope: Tensor
    query_rope: Tensor
    latent: Tensor
    key_rope: Tensor
    joined: Tensor
    w_uk: Tensor
    w_uv: Tensor
    kv_lengths: Tensor | None
    mask: Tensor | None

    def cold(self) -> tuple[str, ...]:
        """The tensors that a decoding step reads from memory."""
        return ("latent", "key_rope", "joined", "w_uk", "w_uv")

    def attend(self, backend: str | None = None) -> Tensor:
        """What headwise makes of it, absorbed: [B,H,S,V]."""
        out = ops.latent_attention(
            self.query_nope,
            self.query_rope,
            self.latent,
            self.key_rope,
            self.w_uk,
            self.w_uv,
            paradigm="absorbed",
            causal=True,
            kv_lengths=self.kv_lengths,
            backend=backend,
        )
        assert isinstance(out, Tensor)
        return out

    def hidden(self) -> Tensor | None:
        """As of `AttentionInputs`."""
        return _hidden(self.mask, self.query_nope.shape[2])


Inputs = AttentionInputs | LatentInputs


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Random tensors of a shape, with scores of about unit spread.

    >>> from headwise.measure.shape import parse_shape
    >>> make_inputs(parse_shape("decode:6/2:d8:32"), torch.bfloat16).key.shape
    torch.Size([1, 2, 32, 8])
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul_(scale).to(dtype)

    spec, batch, queries = shape.spec, shape.batch, shape.query_length
    longest = max(shape.lengths)
    lengths = torch.tensor(shape.lengths) if shape.ragged else None
    mask = _mask(shape)
    if not shape.latent:
        return AttentionInputs(
            query=random(batch, spec.heads, queries, spec.head_dim),
            key=random(batch, spec.kv_heads, longest, spec.head_dim),
            value=random(batch, spec.kv_heads, longest, spec.value_dim),
            kv_lengths=lengths,
            mask=mask,
        )
    rank, rope = spec.cache_rows.dims
    latent, key_rope = random(batch, longest, rank), random(batch, longest, rope)
    return LatentInputs(
        query_nope=random(batch, spec.heads, queries, spec.nope_dim),
        query_rope=random(batch, spec.heads, queries, rope),
        latent=latent,
        key_rope=key_rope,
        joined=torch.cat([latent, key_rope], dim=-1).unsqueeze(1),
        w_uk=random(spec.heads, spec.nope_dim, rank, scale=rank**-0.5),
        w_uv=random(spec.heads, spec.value_dim, rank, scale=rank**-0.5),
        kv_lengths=lengths,
        mask=mask,
    )


def _mask(shape: Shape) -> Tensor | None:
    """Which keys each query sees, [B|1,1,S,L]; None where no mask is needed (see the class)."""
    queries = shape.query_length
    if not shape.ragged and queries in (1, shape.context):
        return None
    lengths = torch.tensor(shape.lengths if shape.ragged else shape.lengths[:1])
    last = lengths.view(-1, 1, 1, 1) - queries + torch.arange(queries).view(1, 1, -1, 1)
    return torch.arange(max(shape.lengths)) <= last


def _hidden(mask: Tensor | None, queries: int) -> Tensor | None:
    """The reverse of a mask; without one several queries are as many as keys (see `_mask`)."""
    if mask is not None:
        return ~mask
    return torch.ones(1, 1, queries, queries, dtype=torch.bool).triu(1) if queries > 1 else None


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
    by default this machine's last-level cache and free memory.
    """
    found = last_level_cache() if cache is None else cache
    size = found or ASSUMED_CACHE
    free = available_bytes(torch.device("cpu")) if memory is None else memory
    one = _cold_bytes(inputs)
    count = min(math.ceil(2 * size / one), free // _MEMORY_SHARE // one, _MOST_COPIES)
    count = max(1, count)
    copies = (inputs, *(_copy(inputs) for _ in range(count - 1)))
    return Cold(copies, count * one, size, found is None)


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


def _cold_bytes(inputs: Inputs) -> int:
    return sum(getattr(inputs, name).nbytes for name in inputs.cold())


def _copy(inputs: Inputs) -> Inputs:
    """The same call with its own memory for what must be cold; the rest is shared."""
    return replace(inputs, **{name: getattr(inputs, name).clone() for name in inputs.cold()})
