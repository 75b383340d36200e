"""Attention written out in loops over single numbers, in float64: what the definition means."""

import math

import numpy as np


def attend_by_hand(
    query,
    key,
    value,
    *,
    causal=False,
    scale=None,
    window=None,
    sinks=None,
    softcap=None,
    alibi_slopes=None,
    bias=None,
    mask=None,
    kv_lengths=None,
    indices=None,
    block_indices=None,
    block_size=1,
):
    """(out [B,H,S,V], lse [B,H,S]) of float64 arrays query [B,H,S,D], key, value [B,K,L,...]."""
    batch, heads, length, dim = query.shape
    kv_heads, context = key.shape[1:3]
    full = (batch, heads, length, context)
    bias = np.zeros(full) if bias is None else np.broadcast_to(bias, full)
    mask = np.ones(full, dtype=bool) if mask is None else np.broadcast_to(mask, full)
    out = np.zeros((batch, heads, length, value.shape[3]))
    lse = np.zeros((batch, heads, length))
    for b, h, s in np.ndindex(batch, heads, length):
        kv_head = h // (heads // kv_heads)
        held = context if kv_lengths is None else int(kv_lengths[b])
        position = held - length + s
        chosen = indices if block_indices is None else block_indices
        own = None if chosen is None else chosen[b, kv_head % chosen.shape[1], s]
        scores = {}
        for j in range(held):
            if causal and j > position:
                continue
            if window is not None and position - j >= window:
                continue
            if not mask[b, h, s, j]:
                continue
            if own is not None and j // block_size not in own:
                continue
            dot = sum(query[b, h, s, d] * key[b, kv_head, j, d] for d in range(dim))
            score = dot * (1 / math.sqrt(dim) if scale is None else scale)
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            score += bias[b, h, s, j]
            if alibi_slopes is not None:
                score -= alibi_slopes[h] * (position - j)
            scores[j] = score
        total = sum(math.exp(score) for score in scores.values())
        if sinks is not None:
            total += math.exp(sinks[h])
        for j, score in scores.items():
            out[b, h, s] += math.exp(score) / total * value[b, kv_head, j]
        lse[b, h, s] = math.log(total) if total > 0 else -math.inf
    return out, lse
