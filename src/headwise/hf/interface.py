"""The attention function that Transformers calls for a model attached to headwise."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import output_capturing

from headwise.errors import UnsupportedError
from headwise.hf.dropout import attend_with_dropout
from headwise.hf.empty_rows import EAGER, empty_rows
from headwise.hf.handed import WindowKV, view_of
from headwise.hf.latent import absorbed_query, attend_absorbed, expand, receives_latents
from headwise.hf.masks import headwise_mask
from headwise.hf.observe import Seen, current_observer
from headwise.hf.owned import NAME
from headwise.ops import attention, attention_weights, explain


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
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = None,
    eager: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend for one module.

    query [B,H,S,D]; key [B,K,L,D] and value [B,K,L,V], or for MLA latent [B,1,L,R] and rope key
    [B,1,L,P]. attention_mask is boolean or additive, [B,1|H,S,L]; None means the module's causal
    and window rule. eager: whether the attention that ours stands for is eager, whose rules for
    rows that see nothing then hold; None asks what `attach` left on the module. Returns out
    [B,S,H,V] and, when asked, the weights [B,H,S,L].
    """
    if indices is not None or block_indices is not None:
        raise UnsupportedError(
            f"{type(module).__name__} attends to chosen tokens only (sparse attention), which "
            "headwise does not: call headwise.detach(model)"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if eager is None:
        eager = getattr(module, EAGER, False)
    kv: Any = view_of(key, value)
    columns = None
    if isinstance(kv, WindowKV):
        # causality and the window are in the mask, or nothing is hidden from the only query
        columns, attention_mask = kv.columns, kv.mask(attention_mask, query.shape[2])
        key, value, kv = kv.key, kv.value, None
        is_causal, sliding_window = False, None
        if position_bias is not None and position_bias.shape[-1] > 1:
            position_bias = position_bias[..., columns]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # a mask that arrives is complete
    causal = bool(causal) and attention_mask is None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # as SDPA does; rotary embeddings leave queries and keys in float32
        low = torch.get_autocast_dtype(kind)
        query, key, value, kv = query.to(low), key.to(low), value.to(low), None
    output_attentions = output_attentions or _weights_are_collected()
    empty = None
    # the sink takes all the weight of a row whose scores are the lowest number
    if attention_mask is not None and s_aux is None:
        given_rows: dict[str, Any] = {"scale": scaling, "softcap": softcap, "bias": position_bias}
        empty = empty_rows(attention_mask, eager=eager, **given_rows)
    observer = current_observer()
    latent, content_dim = None, None
    if receives_latents(module):
        latent = (key.shape[-1], value.shape[-1])
        content_dim = query.shape[-1] - latent[1]
        boolean = attention_mask is None or attention_mask.dtype == torch.bool
        if boolean and not dropout and not output_attentions:
            found = attend_absorbed(
                module,
                query,
                key,
                value,
                kv,
                mask=attention_mask,
                causal=causal,
                scale=scaling,
                return_lse=observer is not None,
            )
            if found is not None:
                out = found[0]
                if empty is not None:
                    out = empty.fill(out, query, *expand(module, key, value))
                out = out.transpose(1, 2).contiguous()
                if observer is not None:
                    rows = (key, value) if kv is None else kv.dense(query.dtype)
                    seen = Seen(
                        module=module,
                        query=absorbed_query(module, query, latent[1]),
                        key=torch.cat(rows, dim=-1),
                        out=out,
                        lse=found[1],
                        options={"causal": causal, "scale": scaling, "mask": attention_mask},
                        content_dim=latent[0],
                        latent=latent,
                    )
                    out = observer(seen)
                return out, None
        key, value = expand(module, key, value)
        kv = None
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scaling,
        "window": sliding_window if causal else None,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": position_bias,
        "mask": None,
    }
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask
    elif attention_mask is not None:
        added = attention_mask if empty is None or dropout else empty.unmasked()
        options["bias"] = added if position_bias is None else added + position_bias
    if dropout:
        # HandedRows make themselves dense
        return attend_with_dropout(
            module,
            query,
            key,
            value,
            dropout,
            options,
            eager=eager,
            weights=bool(output_attentions),
        )
    given = (query, key, value) if kv is None else (query,)
    options["kv"] = kv
    rows = (key, value)
    if kv is not None and not (empty is None and observer is None):
        rows = kv.dense(query.dtype)
    # PyTorch's own kernel gives no lse, and asked for it another one would run
    if observer is not None and explain(*given, **options).chosen != "torch":
        out, lse = attention(*given, **options, return_lse=True)
    else:
        out, lse = attention(*given, **options), None
    if empty is not None:
        out = empty.fill(out, query, *rows)
    out = out.transpose(1, 2).contiguous()
    if observer is not None:
        seen = Seen(
            module=module,
            query=query,
            key=rows[0],
            out=out,
            lse=lse,
            options={name: value for name, value in options.items() if name != "kv"},
            content_dim=content_dim,
            latent=latent,
            columns=columns,
        )
        out = observer(seen)
    if not output_attentions:
        return out, None
    weights = attention_weights(*given[:2], **options).to(query.dtype)
    return out, weights if empty is None else empty.fill_weights(weights, query, rows[0])


def _weights_are_collected() -> bool:
    """Whether the running forward was called with output_attentions=True.

    GPT-2 and GPT-BigCode do not hand that argument on to the attention function, so ask what
    collects their outputs. A compiler cannot trace that, and gets the argument alone.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    collected = collector.get() or {}
    return "attentions" in collected or "cross_attentions" in collected
