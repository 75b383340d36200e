"""Attention with dropout, which our operators do not have: Transformers' own code.

It draws the random numbers that the model drew before it was attached, where that was eager or
SDPA.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.errors import UnsupportedError


def attend_with_dropout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    options: dict[str, Any],
    *,
    eager: bool,
    weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Out [B,S,H,V] and, where `weights` asks for them, the weights [B,H,S,L].

    query [B,H,S,D], key [B,K,L,D], value [B,K,L,V]; options: as `attention` takes them; eager:
    whether that was the attention before.
    """
    mask = _explicit_mask(query, key, options)
    by_sdpa = not (eager or weights) and options["softcap"] is None and options["sinks"] is None
    function: Any = sdpa_attention_forward
    extra = {"is_causal": False}
    hidden = None
    if not by_sdpa:
        function, extra = _eager_function(module), {"softcap": options["softcap"]}
        if mask.dtype == torch.bool:
            hidden = None if eager else ~mask.any(-1)
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    out, weight = function(
        module, query, key, value, mask, dropout=dropout, scaling=options["scale"], **extra
    )
    if hidden is not None:
        # what was there before gives 0 where eager averages
        out = out.masked_fill(hidden.transpose(1, 2).unsqueeze(-1), 0.0)
        weight = weight.masked_fill(hidden.unsqueeze(-1), 0.0)
    return out, weight if weights else None


def _eager_function(module: nn.Module) -> Any:
    """Transformers' eager attention of the module's family, a subclass of a user's included."""
    name = "eager_attention_forward"
    for base in type(module).__mro__:
        names = vars(sys.modules[base.__module__])
        # where one file has several, some are named after their tower
        found = names.get(name) or next((names[at] for at in names if at.endswith(name)), None)
        if found is not None:
            return found
    raise UnsupportedError(
        f"{type(module).__name__} has no eager attention to take dropout from: set its attention "
        "dropout to 0, or call headwise.detach(model)"
    )


def _explicit_mask(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """All that `options` masks or adds, as one [B|1,1|H,S,L]: additive where there is a bias."""
    length, context = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, length, context, dtype=torch.bool, device=query.device)
    if options["causal"]:
        visible = visible.tril(context - length)
    if options["window"] is not None:
        visible = visible.triu(context - length - options["window"] + 1)
    if options["mask"] is not None:
        visible = visible & options["mask"]
    if options["bias"] is None:
        return visible
    return torch.where(visible, options["bias"].to(query.dtype), torch.finfo(query.dtype).min)
