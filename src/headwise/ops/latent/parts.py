"""A prompt's latent attention in parts, so that what is made for it stays small.

Absorbed, the queries and results in the latents' dims are made for some queries at a time;
expanded, keys and values for some heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.ops.attend.visible import part_of
from headwise.ops.modes import forward_mode, needs_gradients
from headwise.ops.views import KV

# Bytes that are made at once.
_MOST = 2**26


@dataclass(slots=True, eq=False)
class LatentCall:
    """The tensors of a call, as `latent_attention` takes them; options: all that is not one."""

    query_nope: Tensor
    query_rope: Tensor
    latent: Tensor | None
    key_rope: Tensor | None
    w_uk: Tensor
    w_uv: Tensor
    kv: KV | None
    kv_lengths: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    indices: Tensor | None
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """What `latent_attention` is called with."""
        tensors = {name: getattr(self, name) for name in self.__slots__ if name != "options"}
        return tensors | self.options


def parts(call: LatentCall, paradigm: str, context: int) -> tuple[int, Iterator[LatentCall]] | None:
    """The dim that is cut, of queries or heads, and the parts; None where all is one.

    A part of the queries has its own lengths, by which causality is aligned.
    """
    batch, heads, length, _ = call.query_nope.shape
    size = batch * call.query_nope.element_size()
    tensors = (call.query_nope, call.query_rope, call.latent, call.key_rope, call.w_uk, call.w_uv)
    if torch.compiler.is_compiling() or forward_mode():
        return None
    if needs_gradients(*(tensor for tensor in tensors if tensor is not None)):
        return None
    if paradigm == "absorbed":
        rows = max(1, _MOST // max(1, 2 * size * heads * call.w_uk.shape[2]))
        return None if rows >= length else (2, _of_queries(call, rows, context))
    width = call.query_nope.shape[3] + call.query_rope.shape[3] + call.w_uv.shape[1]
    some = max(1, _MOST // max(1, size * context * width))
    return None if some >= heads else (1, _of_heads(call, some))


def _of_queries(call: LatentCall, rows: int, context: int) -> Iterator[LatentCall]:
    batch, _, length, _ = call.query_nope.shape
    for first in range(0, length, rows):
        part = slice(first, min(first + rows, length))
        lengths, kv, options = call.kv_lengths, call.kv, call.options
        if options["key_positions"] is not None:
            moved = options["key_positions"] + (length - part.stop)
            options = {**options, "key_positions": moved}
        elif options["causal"]:
            device = call.query_nope.device
            if kv is not None and kv.lengths is not None:
                lengths = kv.lengths
            whole = torch.full((batch,), context, device=device) if lengths is None else lengths
            lengths = (whole - (length - part.stop)).clamp(min=0)
            if kv is not None and kv.lengths is not None:
                kv, lengths = replace(kv, lengths=lengths), None
        yield replace(
            call,
            query_nope=call.query_nope[:, :, part],
            query_rope=call.query_rope[:, :, part],
            kv=kv,
            kv_lengths=lengths,
            mask=None if call.mask is None else part_of(call.mask, 2, part),
            indices=None if call.indices is None else call.indices[:, :, part],
            options=options,
        )


def _of_heads(call: LatentCall, some: int) -> Iterator[LatentCall]:
    if call.kv is not None:
        latent, key_rope = call.kv.dense(call.query_nope.dtype)
        lengths = call.kv_lengths if call.kv.lengths is None else call.kv.lengths
        call = replace(
            call,
            latent=latent.squeeze(1),
            key_rope=key_rope.squeeze(1),
            kv=None,
            kv_lengths=lengths,
        )
    for first in range(0, call.query_nope.shape[1], some):
        part = slice(first, first + some)
        yield replace(
            call,
            query_nope=call.query_nope[:, part],
            query_rope=call.query_rope[:, part],
            w_uk=call.w_uk[part],
            w_uv=call.w_uv[part],
            sinks=None if call.sinks is None else call.sinks[part],
            mask=None if call.mask is None else part_of(call.mask, 1, part),
        )
