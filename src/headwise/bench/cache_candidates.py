"""headwise on its own caches: keys and values (or latents) in pages, or as integers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

import headwise.ops as ops
from headwise.bench.candidate import Bind, Candidate, never_missing
from headwise.caches import PagedCache, QuantizedCache
from headwise.measure.inputs import Inputs, LatentInputs
from headwise.measure.shape import Shape
from headwise.ops import Bits


def _from_cache(make: Callable[[], PagedCache | QuantizedCache]) -> Callable[[Shape, Any], Bind]:
    def build(shape: Shape, inputs: Inputs) -> Bind:
        return lambda given: _run(make(), given)

    return build


def _run(cache: PagedCache | QuantizedCache, given: Inputs) -> Callable[[], Tensor]:
    """Fill a cache with one call's keys and values; what it returns attends to them."""
    kv = cache.append(*_pair(given))
    options: dict[str, Any] = {"causal": True, "kv_lengths": given.kv_lengths, "kv": kv}
    if not isinstance(given, LatentInputs):
        return lambda: ops.attention(given.query, **options)

    def run() -> Tensor:
        out = ops.latent_attention(
            given.query_nope,
            given.query_rope,
            w_uk=given.w_uk,
            w_uv=given.w_uv,
            paradigm="absorbed",
            **options,
        )
        assert isinstance(out, Tensor)
        return out

    return run


def _pair(given: Inputs) -> tuple[Tensor, Tensor]:
    """[B,K,L,D] and [B,K,L,V], or [B,1,L,R] and [B,1,L,P]."""
    if isinstance(given, LatentInputs):
        return given.latent.unsqueeze(1), given.key_rope.unsqueeze(1)
    return given.key, given.value


def _rounded(bits: Bits) -> Callable[[Inputs], Inputs]:
    """The inputs as a quantised cache holds them, in float32."""

    def held(given: Inputs) -> Inputs:
        first, second = (
            ops.dequantize(*ops.quantize(rows, bits), bits=bits) for rows in _pair(given)
        )
        if isinstance(given, LatentInputs):
            return replace(given, latent=first.squeeze(1), key_rope=second.squeeze(1))
        return replace(given, key=first, value=second)

    return held


def _quantized(bits: Bits) -> Candidate:
    return Candidate(
        f"int{bits}",
        f"headwise on its cache of {bits}-bit integers",
        never_missing,
        _from_cache(lambda: QuantizedCache(bits)),
        held=_rounded(bits),
        bits=bits,
    )


def _paged(size: int) -> Candidate:
    return Candidate(
        f"paged-{size}",
        f"headwise on its cache in pages of {size} tokens",
        never_missing,
        _from_cache(lambda: PagedCache(size)),
    )


CACHES = (_paged(16), _paged(64), _quantized(8), _quantized(4))
