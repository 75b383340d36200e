"""The definition of latent attention: multi-head attention over the keys and values of the latents.

Head h has key [w_uk[h] c | k] and value w_uv[h] c, of the latent c and the rotary key k.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

import torch
from torch import Tensor


def expand(latent: Tensor, key_rope: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B,H,L,N+P] and values [B,H,L,V].

    latent [B,1,L,R], key_rope [B,1,L,P], w_uk [H,N,R], w_uv [H,V,R].
    """
    nope = _up_project(latent, w_uk)
    key = torch.cat([nope, key_rope.expand(-1, nope.shape[1], -1, -1)], dim=-1)
    return key, _up_project(latent, w_uv)


def _up_project(latent: Tensor, weight: Tensor) -> Tensor:
    """latent [B,1,L,R] by weight [H,X,R]: [B,H,L,X]."""
    batch, _, context, rank = latent.shape
    flat = latent.reshape(batch, context, rank) @ weight.reshape(-1, rank).T
    return flat.view(batch, context, weight.shape[0], weight.shape[1]).transpose(1, 2)
