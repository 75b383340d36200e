"""The operators, and the backends that run them.

An operator is a folder (attend, latent, integers): what a call of it is, its definition, and the
function. What runs it is a backend, a file in backend.
"""

from headwise.ops.attend.call import AttentionCall, Options, Problem
from headwise.ops.attend.checks import check_mask_and_bias, require_tensor
from headwise.ops.attend.chosen import chosen_mask, masked_options
from headwise.ops.attend.merge import merge_attention
from headwise.ops.attend.operator import attention, explain, explain_call, run_call
from headwise.ops.attend.visible import visible_keys
from headwise.ops.attend.weights import attention_weights, score_rows, weights_of
from headwise.ops.backend import BACKENDS, explain_problem, faster, layer_offer
from headwise.ops.backend.protocol import (
    Accepted,
    Backend,
    Explanation,
    LayerOffer,
    Offer,
    Rejected,
    Verdict,
)
from headwise.ops.convolution.call import ACTIVATIONS as CONV_ACTIVATIONS
from headwise.ops.convolution.call import ConvolutionCall
from headwise.ops.convolution.operator import causal_conv1d, convolve
from headwise.ops.indexer.operator import index_topk
from headwise.ops.integers.operator import quantize
from headwise.ops.integers.rounding import Bits, dequantize, rotate, row_bytes
from headwise.ops.latent.operator import latent_attention
from headwise.ops.latent.paradigm import Paradigm, choose_paradigm
from headwise.ops.linear_attention.call import LinearCall
from headwise.ops.linear_attention.operator import change_state, linear_attention
from headwise.ops.modes import are_few, in_backward, needs_gradients, watched
from headwise.ops.packed.formats import (
    FORMATS as BLOCK_FORMATS,
)
from headwise.ops.packed.formats import (
    BlockFormat,
    format_of,
    is_packed,
    packed_columns,
    weight_sizes,
)
from headwise.ops.packed.operator import pack, packed_linear, round_blocks, unpack
from headwise.ops.sketch.call import Budget
from headwise.ops.sketch.operator import choose_keys, keys_alone, sketch_of
from headwise.ops.sketch.rest import add_rest, means_of, means_under
from headwise.ops.top_keys.operator import top_keys
from headwise.ops.views import KV, PagedKV, QuantKV

__all__ = [
    "BLOCK_FORMATS",
    "CONV_ACTIVATIONS",
    "KV",
    "Accepted",
    "AttentionCall",
    "Backend",
    "Bits",
    "Budget",
    "BlockFormat",
    "ConvolutionCall",
    "Explanation",
    "LayerOffer",
    "LinearCall",
    "Offer",
    "Options",
    "PagedKV",
    "Paradigm",
    "Problem",
    "QuantKV",
    "Rejected",
    "Verdict",
    "add_rest",
    "are_few",
    "attention",
    "attention_weights",
    "backends",
    "causal_conv1d",
    "change_state",
    "check_mask_and_bias",
    "choose_keys",
    "choose_paradigm",
    "chosen_mask",
    "convolve",
    "masked_options",
    "dequantize",
    "explain",
    "explain_call",
    "explain_problem",
    "faster",
    "format_of",
    "in_backward",
    "index_topk",
    "is_packed",
    "keys_alone",
    "latent_attention",
    "layer_offer",
    "linear_attention",
    "means_of",
    "means_under",
    "merge_attention",
    "needs_gradients",
    "pack",
    "packed_columns",
    "packed_linear",
    "quantize",
    "require_tensor",
    "rotate",
    "round_blocks",
    "row_bytes",
    "run_call",
    "score_rows",
    "sketch_of",
    "top_keys",
    "unpack",
    "visible_keys",
    "watched",
    "weight_sizes",
    "weights_of",
]


def backends() -> tuple[Backend, ...]:
    """Every backend, in order of speed."""
    return BACKENDS
