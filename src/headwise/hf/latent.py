"""MLA inside Transformers: attend over the cached latents instead of expanding them every token.

Transformers' MLA modules call `self.expand_kv(latent, rope_key)` on the whole cache and then the
attention function. Where that method is replaced by `LatentPassthrough`, the attention function
receives the latents, and decides per call between absorbing and the module's own expansion.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedError
from headwise.hf.cached_rows import CachedRows
from headwise.hf.latent_modules import obstacle
from headwise.hf.module_hook import NAME, ModuleHook
from headwise.hf.request import Request
from headwise.ops import choose_paradigm, latent_attention


class LatentPassthrough(ModuleHook):
    """Stands in for a module's `expand_kv`: latent [B,1,L,R] and rope key [B,1,L,P] go through.

    Where the user has set another attention since, it is the module's own expansion again. What
    goes through is marked, so that our attention function knows it again.
    """

    def __call__(self, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are, for our attention function."""
        module = self.owner
        if not receives_latents(module):
            return expand(module, latent, key_rope)
        return self._marked(latent, "latent"), self._marked(key_rope, "rope key")

    def require(self, latent: Tensor, key_rope: Tensor) -> None:
        """Check that the attention function was given what went through, and nobody wrote to it.

        Raises:
            UnsupportedError: other tensors.
        """
        for given, part in ((latent, "latent"), (key_rope, "rope key")):
            if getattr(given, _MARK, None) != (self, part, _version(given)):
                raise UnsupportedError(
                    f"{type(self.owner).__name__} does not attend to what its expand_kv returns, "
                    f"but to something made of it (its {part}), so that its latents cannot be "
                    "absorbed: call headwise.detach(model)"
                )

    def _marked(self, rows: Tensor, part: str) -> Tensor:
        # a mark lives as long as the call: it is on an alias, and never on what a cache keeps
        alias = rows if isinstance(rows, CachedRows) else rows.view_as(rows)
        setattr(alias, _MARK, (self, part, _version(rows)))
        return alias


# An attribute of the tensors that a LatentPassthrough hands on: itself, the part, the version.
_MARK = "_headwise_handed_on"


def _version(rows: Tensor) -> int | None:
    """How often PyTorch has seen somebody write to it; None where it does not count."""
    if torch.compiler.is_compiling() or rows.is_inference():
        return None
    return rows._version


def receives_latents(module: Any) -> bool:
    """Whether this module's attention function gets latents in place of keys and values."""
    passes = isinstance(module.__dict__.get("expand_kv"), LatentPassthrough)
    return passes and module.config._attn_implementation == NAME


def require_latents(module: Any, key: Tensor, value: Tensor) -> None:
    """Where a module is to give latents, check that these are the ones that it was handed.

    Raises:
        UnsupportedError: they are others.
    """
    if receives_latents(module):
        module.__dict__["expand_kv"].require(key, value)


def expand(module: Any, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
    """The module's own expansion: key [B,H,L,N+P] and value [B,H,L,V]."""
    key, value = type(module).expand_kv(module, latent, key_rope)
    return key, value


def absorb(request: Request) -> tuple[Tensor, Tensor | None] | None:
    """out [B,H,S,V] and, when asked, lse [B,H,S] by absorption.

    None where the module's own expansion is right or cheaper. The request has queries [B,H,S,N+P],
    latents [B,1,L,R] and rope keys [B,1,L,P], or a view of these.
    """
    module: Any = request.module
    query, latent, options = request.query, request.key, request.options
    if (
        request.dropout
        or request.weights
        or options.bias is not None
        or options.softcap is not None
    ):
        return None
    # an adapter or a quantiser may have wrapped the projection since attach
    if obstacle(module) is not None:
        return None
    weight: Tensor = module.kv_b_proj.weight
    if torch.is_autocast_enabled(latent.device.type):
        weight = weight.to(latent.dtype)
    if weight.dtype != latent.dtype:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, latent, weight)):
        return None
    rope_dim, rank = request.value.shape[-1], latent.shape[-1]
    batch, heads, length, dim = query.shape
    nope_dim, value_dim = dim - rope_dim, weight.shape[0] // heads - (dim - rope_dim)
    paradigm = choose_paradigm(
        batch=batch,
        heads=heads,
        query_length=length,
        context=latent.shape[2],
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        rank=rank,
        itemsize=query.element_size(),
        chosen=None if options.indices is None else options.indices.shape[-1],
    )
    if paradigm == "expanded":
        return None
    kv, per_head = request.kv, weight.view(heads, -1, rank)
    result = latent_attention(
        query[..., :nope_dim],
        query[..., nope_dim:],
        latent=None if kv is not None else latent.squeeze(1),
        key_rope=None if kv is not None else request.value.squeeze(1),
        w_uk=per_head[:, :nope_dim],
        w_uv=per_head[:, nope_dim:],
        kv=kv,
        paradigm=paradigm,
        causal=options.causal,
        scale=options.scale,
        key_positions=options.key_positions,
        window=options.window,
        sinks=options.sinks,
        mask=options.mask,
        indices=options.indices,
        return_lse=options.return_lse,
    )
    return result if isinstance(result, tuple) else (result, None)


def absorbed_query(module: Any, query: Tensor, rope_dim: int) -> Tensor:
    """The query that meets a cached row [latent | rope key]: [B,H,S,N+P] to [B,H,S,R+P].

    Only where `obstacle` finds none.
    """
    query_nope, query_rope = query.split([query.shape[-1] - rope_dim, rope_dim], dim=-1)
    weight = module.kv_b_proj.weight.to(query.dtype)
    heads = weight.view(query.shape[1], -1, weight.shape[1])
    return torch.cat([query_nope @ heads[:, : query_nope.shape[-1]], query_rope], dim=-1)
