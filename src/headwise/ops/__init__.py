"""The operators, and the backends that run them."""

from headwise.ops._attention import attention, explain
from headwise.ops._call import Problem, check_mask_and_bias, require_tensor
from headwise.ops._choice import (
    BACKENDS,
    Accepted,
    Backend,
    Explanation,
    Rejected,
    Verdict,
    explain_problem,
)
from headwise.ops._integers import Bits, dequantize, rotate, row_bytes
from headwise.ops._latent import Paradigm, choose_paradigm, latent_attention
from headwise.ops._quantize import quantize
from headwise.ops._views import KV, PagedKV, QuantKV
from headwise.ops._weights import attention_weights, score_rows

__all__ = [
    "KV",
    "Accepted",
    "Backend",
    "Bits",
    "Explanation",
    "Problem",
    "Rejected",
    "Verdict",
    "attention",
    "attention_weights",
    "backends",
    "PagedKV",
    "Paradigm",
    "QuantKV",
    "check_mask_and_bias",
    "choose_paradigm",
    "dequantize",
    "explain",
    "explain_problem",
    "latent_attention",
    "quantize",
    "require_tensor",
    "rotate",
    "row_bytes",
    "score_rows",
]


def backends() -> tuple[Backend, ...]:
    """Every backend, in order of speed."""
    return BACKENDS
