"""What Transformers asks of one attention module, read into one value."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedError
from headwise.hf.cached_rows import SparseKV, WindowKV, view_of
from headwise.hf.chosen_mask import ChosenMask
from headwise.hf.empty_rows import EAGER, EmptyRows, empty_rows
from headwise.hf.indexers.blocks import POSITIONS
from headwise.hf.indexers.lightning import all_keys
from headwise.hf.sparse import choose_for
from headwise.hf.stock_names import _active_collector, is_tracing
from headwise.hf.window_mask import WindowMask, window_of
from headwise.ops import KV, AttentionCall, Options, chosen_mask


@dataclass(slots=True, eq=False)
class Request:
    """One call of our attention function.

    query [B,H,S,D], key [B,K,L,D], value [B,K,L,V], or for MLA latents and rope keys; `kv` the view
    that stands for both. mask: as it came, or what a window with sinks leaves of it. eager: whether
    the attention before was eager. empty: the rows that average all values. weights: whether the
    attention weights are asked for. columns: the keys' positions where a cache has dropped some.
    sinks: one per query, [B,H,S,1]; one per head is an option. rest: beside chosen keys, what the
    others have of the softmax [B,H,S], and the means of values [B,K,S,V] that these count by.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    kv: KV | None
    options: Options
    dropout: float
    mask: Tensor | None = None
    eager: bool = False
    empty: EmptyRows | None = None
    weights: bool = False
    columns: Tensor | None = None
    sinks: Tensor | None = None
    rest: tuple[Tensor, Tensor] | None = None

    def call(self) -> AttentionCall:
        """The call of our operator."""
        if self.kv is None:
            return AttentionCall(self.query, self.key, self.value, self.options)
        self.options.kv_lengths = self.kv.lengths
        return AttentionCall(self.query, self.kv.key, self.kv.value, self.options, kv=self.kv)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values as tensors."""
        return (self.key, self.value) if self.kv is None else self.kv.dense(self.query.dtype)


def read_request(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    /,  # what modules pass on besides may have any name
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    eager: bool | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **others: Any,
) -> Request:
    """The request of what Transformers' modules give, under their names.

    eager: whether the attention that ours stands for is eager, whose rules for rows that see
    nothing then hold; None asks what `attach` left on the module. `others` concern no attention.

    Raises:
        UnsupportedError: chosen blocks of tokens, whose size the module does not say.
    """
    kv: Any = view_of(key, value)
    sparse = kv if isinstance(kv, SparseKV) else None
    if sparse is not None:
        key, value = sparse.key, sparse.value
        kv = view_of(key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    chosen = None
    eager = getattr(module, EAGER, False) if eager is None else eager
    if isinstance(mask, ChosenMask) and eager and mask.leaves_rows_empty():
        mask = mask.dense()
    if isinstance(mask, ChosenMask):  # complete, whatever the module says
        chosen, mask, causal = mask, mask.rest, False
    if isinstance(mask, WindowMask):
        rule = window_of(mask, query, key, kv)
        if rule is None:
            mask = mask.dense()
        else:  # it is complete, whatever the module says
            mask, causal, sliding_window = None, True, rule
    options = Options(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
    )
    if chosen is not None:
        chosen.write_to(options)
    if indices is not None and not all_keys(indices):
        options.indices = indices.unsqueeze(1).to(torch.int32)
    weights = bool(output_attentions) or _weights_are_collected()
    request = Request(module, query, key, value, kv, options, dropout, mask, weights=weights)
    request.sinks = sinks
    if isinstance(kv, WindowKV):
        _read_window(request, kv)
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        _lower(request, torch.get_autocast_dtype(query.device.type))
    if block_indices is not None:
        _read_blocks(request, block_indices)
    options.causal = bool(causal) and request.mask is None  # a mask that arrives is complete
    if not options.causal or request.columns is not None:
        options.causal, options.window = False, None
    if request.mask is not None or dropout:
        request.eager = eager
        _read_mask(request)
    if sparse is not None and request.sinks is None and not dropout:
        choice = choose_for(sparse, request.query, options, options.mask)
        if choice is not None:
            options.indices, request.rest = choice
    return request


def _read_blocks(request: Request, blocks: Tensor) -> None:
    """Take chosen blocks as MiniMax-M3 means them, with the keys that stock's own mask hides.

    A row whose blocks are all hidden averages every value there. Where that has to have gradients,
    or weights, or cannot be looked for, stock's additive mask stands for all of it.
    """
    options, query = request.options, request.query
    options.block_indices, options.block_size = blocks.to(torch.int32), _block_size(request.module)
    position, context = getattr(blocks, POSITIONS, None), request.key.shape[2]
    if request.mask is None and position is not None:
        every = torch.arange(context, device=query.device)
        request.mask = every <= position[:, None, :, None]
    if request.mask is None:
        return
    mask = request.mask if request.mask.dtype == torch.bool else request.mask == 0
    request.mask = mask
    tensors = (query, request.key, request.value)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if gradients or request.weights or request.dropout or is_tracing(query):
        chosen = chosen_mask(options, query.shape[1], context)
        assert chosen is not None
        lowest = torch.finfo(query.dtype).min
        request.mask = query.new_zeros(()).masked_fill(~(chosen & mask), lowest)
        options.block_indices = options.block_size = None


def _block_size(module: Any) -> int:
    """Keys of a block, as the module's indexer has it."""
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise UnsupportedError(
            f"{type(module).__name__} attends to chosen blocks of tokens (sparse attention), whose "
            "size it does not say: call headwise.detach(model)"
        )
    return size


def _read_window(request: Request, kv: WindowKV) -> None:
    """Take the keys that are left; causality and the window are in the mask, or hide nothing."""
    request.mask = kv.mask(request.mask, request.query.shape[2])
    request.key, request.value, request.kv, request.columns = kv.key, kv.value, None, kv.columns
    bias = request.options.bias
    if bias is not None and bias.shape[-1] > 1:
        request.options.bias = bias[..., kv.columns]


def _lower(request: Request, low: torch.dtype) -> None:
    """As SDPA does under autocast; rotary embeddings leave queries and keys in float32."""
    query, key, value = request.query, request.key, request.value
    request.query, request.key, request.value = query.to(low), key.to(low), value.to(low)
    request.kv = None


def _read_mask(request: Request) -> None:
    """Put a mask that arrived into the options, and say which rows it leaves nothing."""
    options, mask = request.options, request.mask
    if mask is None:
        return
    # the sink takes all the weight of a row whose scores are the lowest number
    if options.sinks is None and request.sinks is None:
        request.empty = empty_rows(
            mask,
            eager=request.eager,
            scale=options.scale,
            softcap=options.softcap,
            bias=options.bias,
        )
    if mask.dtype == torch.bool:
        options.mask = mask
        return
    if request.empty is not None and not request.dropout:
        mask = request.empty.unmasked()
    options.bias = mask if options.bias is None else mask + options.bias


def _weights_are_collected() -> bool:
    """Whether the running forward was called with output_attentions=True.

    GPT-2 and GPT-BigCode do not hand that argument on to the attention function, so ask what
    collects their outputs. A compiler cannot trace that, and gets the argument alone.
    """
    if torch.compiler.is_compiling():
        return False
    collected = _active_collector.get() or {}
    return "attentions" in collected or "cross_attentions" in collected
