"""Which form of latent attention to run: the one with less counted work."""

from typing import Literal

Paradigm = Literal["auto", "expanded", "absorbed"]

# FLOPs that a processor does in the time that it takes to move one byte: about 10 on CPUs in
# bfloat16 (300 GFLOP/s, 30 GB/s). It only decides where "auto" changes over.
_FLOPS_PER_BYTE = 10


def choose_paradigm(
    *,
    batch: int,
    heads: int,
    query_length: int,
    context: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    rank: int,
    itemsize: int,
    chosen: int | None = None,
) -> Literal["expanded", "absorbed"]:
    """The paradigm with less work, counting FLOPs and the bytes that each has to move.

    >>> deepseek_v2_lite = dict(heads=16, nope_dim=128, rope_dim=64, value_dim=128, rank=512)
    >>> choose_paradigm(batch=1, query_length=1, context=4096, itemsize=2, **deepseek_v2_lite)
    'absorbed'
    >>> choose_paradigm(batch=1, query_length=4096, context=4096, itemsize=2, **deepseek_v2_lite)
    'expanded'

    chosen: keys that a query attends to, where fewer are chosen for it. Absorbed, those alone are
    read; expanded, the rest is hidden.
    """
    scored = 2 * batch * heads * query_length * context
    read = context if chosen is None else min(context, query_length * chosen)
    cached, gathered = (batch * keys * (rank + rope_dim) for keys in (context, read))
    expanded = batch * context * heads * (nope_dim + rope_dim + value_dim)
    up_projection = 2 * batch * context * heads * rank * (nope_dim + value_dim)
    # expanded keys and values are written once and read once
    work_expanded = (
        up_projection
        + scored * (nope_dim + rope_dim + value_dim)
        + _FLOPS_PER_BYTE * itemsize * (cached + 2 * expanded)
    )
    folding = 2 * batch * heads * query_length * rank * (nope_dim + value_dim)
    absorbed_key = rank + rope_dim if nope_dim else rope_dim
    if chosen is not None:
        scored = 2 * batch * heads * query_length * min(context, chosen)
    work_absorbed = folding + scored * (absorbed_key + rank)
    work_absorbed += _FLOPS_PER_BYTE * itemsize * gathered
    return "absorbed" if work_absorbed < work_expanded else "expanded"
