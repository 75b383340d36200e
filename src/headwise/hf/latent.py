"""MLA inside Transformers: attend over the cached latents instead of expanding them every token.

Transformers' MLA modules call `self.expand_kv(latent, rope_key)` on the whole cache and then the
attention function. Where that method is replaced by `LatentPassthrough`, the attention function
receives the latents, and decides per call between absorbing and the module's own expansion.
"""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.module_hook import NAME, ModuleHook
from headwise.hf.request import Request
from headwise.ops import choose_paradigm, latent_attention


class LatentPassthrough(ModuleHook):
    """Stands in for a module's `expand_kv`: latent [B,1,L,R] and rope key [B,1,L,P] go through.

    Where the user has set another attention since, it is the module's own expansion again.
    """

    def __call__(self, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are, for our attention function."""
        module = self.owner
        return (latent, key_rope) if receives_latents(module) else expand(module, latent, key_rope)


def receives_latents(module: Any) -> bool:
    """Whether this module's attention function gets latents in place of keys and values."""
    passes = isinstance(module.__dict__.get("expand_kv"), LatentPassthrough)
    return passes and module.config._attn_implementation == NAME


def expand(module: Any, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
    """The module's own expansion: key [B,H,L,N+P] and value [B,H,L,V]."""
    key, value = type(module).expand_kv(module, latent, key_rope)
    return key, value


def obstacle(module: Any) -> str | None:
    """Why w_uk and w_uv cannot be read off the module's up-projection; None if they can."""
    projection = module.kv_b_proj
    if type(projection) is not nn.Linear or type(projection.weight) is not nn.Parameter:
        return f"kv_b_proj is a {type(projection).__name__} with its own way to multiply"
    if projection.bias is not None:
        return "kv_b_proj has a bias"
    replaced = "forward" in projection.__dict__ or projection.weight.device.type == "meta"
    if replaced or projection._forward_hooks or projection._forward_pre_hooks:
        return "kv_b_proj has hooks"
    return None


def absorb(request: Request) -> tuple[Tensor, Tensor | None] | None:
    """out [B,H,S,V] and, when asked, lse [B,H,S] by absorption.

    None where the module's own expansion is right or cheaper. The request has queries [B,H,S,N+P],
    latents [B,1,L,R] and rope keys [B,1,L,P], or a view of these.
    """
    module: Any = request.module
    query, latent, options = request.query, request.key, request.options
    extras = (options.bias, options.softcap, options.sinks, options.window)
    if request.dropout or request.weights or any(extra is not None for extra in extras):
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
        mask=options.mask,
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
