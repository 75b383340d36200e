"""The attention function that Transformers calls for a model attached to headwise."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from headwise.hf.attend import attend_latents, attend_rows
from headwise.hf.cached_rows import SplitKV
from headwise.hf.latent import require_latents
from headwise.hf.masks import headwise_mask
from headwise.hf.module_hook import NAME
from headwise.hf.observer import current_observer, observed
from headwise.hf.parallel.attend import attend_split
from headwise.hf.request import read_request
from headwise.hf.stock_names import AttentionMaskInterface


def register() -> None:
    """Make the name known to Transformers, for the whole process; any number of times."""
    AttentionInterface.register(NAME, headwise_attention_forward)
    # without a mask function of its own the mask would silently be None
    AttentionMaskInterface.register(NAME, headwise_mask)


def headwise_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend for one module.

    query [B,H,S,D]; key [B,K,L,D] and value [B,K,L,V], or for MLA latent [B,1,L,R] and rope key
    [B,1,L,P]. attention_mask is boolean or additive, [B,1|H,S,L]; None means the module's causal
    and window rule. `asked`: as `read_request` takes it. Returns out [B,S,H,V] and, when asked, the
    weights [B,H,S,L].

    Raises:
        UnsupportedError: attention to chosen blocks, or MLA whose module changed the latents.
    """
    require_latents(module, key, value)
    request = read_request(module, query, key, value, attention_mask, dropout, scaling, **asked)
    observer = current_observer()
    if isinstance(request.kv, SplitKV):
        merged = attend_split(request, observed=observer is not None)
        if merged is not None:
            return merged, None
    if observer is not None:
        return observed(observer, request)
    out, weights, _ = attend_latents(request) or attend_rows(request)
    return out, weights
