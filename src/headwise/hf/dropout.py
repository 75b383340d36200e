"""Transformers' own code, for dropout, which our operators do not have, and for weights of its own.

It draws the random numbers that the model drew before it was attached, where that was eager or
SDPA.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedError
from headwise.hf.request import Request
from headwise.hf.stock_names import sdpa_attention_forward
from headwise.ops import Options, chosen_mask


def attend_with_dropout(request: Request) -> tuple[Tensor, Tensor | None]:
    """Out [B,S,H,V] and, where asked for, the weights [B,H,S,L]."""
    module, query, options = request.module, request.query, request.options
    key, value = request.rows
    mask = _explicit_mask(query, key, options)
    exact = request.eager or request.weights
    by_sdpa = not exact and options.softcap is None and options.sinks is None
    function: Any = sdpa_attention_forward
    extra: dict[str, Any] = {"is_causal": False}
    hidden = None
    if not by_sdpa:
        function, extra = eager_function(module), {"softcap": options.softcap}
        if function is None:
            raise UnsupportedError(
                f"{type(module).__name__} has no eager attention to take dropout from: set its "
                "attention dropout to 0, or call headwise.detach(model)"
            )
        if request.sinks is not None:
            extra["sinks"] = request.sinks
        if mask.dtype == torch.bool:
            hidden = None if request.eager else ~mask.any(-1)
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    extra |= {"dropout": request.dropout, "scaling": options.scale}
    out, weight = function(module, query, key, value, mask, **extra)
    if hidden is not None:
        # what was there before gives 0 where eager averages
        out = out.masked_fill(hidden.transpose(1, 2).unsqueeze(-1), 0.0)
        weight = weight.masked_fill(hidden.unsqueeze(-1), 0.0)
    return out, weight if request.weights else None


def eager_function(module: Any) -> Any:
    """Transformers' eager attention of the module's family, a subclass of a user's included.

    None where the family has none.
    """
    name = "eager_attention_forward"
    for base in type(module).__mro__:
        names = vars(sys.modules[base.__module__])
        # where one file has several, some are named after their tower
        others = (function for other, function in names.items() if other.endswith(name))
        function = names.get(name) or next(others, None)
        if function is not None:
            return function
    return None


def _explicit_mask(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """All that `options` masks or adds, as one [B|1,1|H,S,L]: additive where there is a bias."""
    length, context = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, length, context, dtype=torch.bool, device=query.device)
    if options.causal:
        visible = visible.tril(context - length)
    if options.window is not None:
        visible = visible.triu(context - length - options.window + 1)
    if options.mask is not None:
        visible = visible & options.mask
    chosen = chosen_mask(options, query.shape[1], context)
    if chosen is not None:
        visible = visible & chosen
    if options.bias is None:
        return visible
    return torch.where(visible, options.bias.to(query.dtype), torch.finfo(query.dtype).min)
