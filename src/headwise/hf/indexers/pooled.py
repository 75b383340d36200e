"""Pooled indexers (GLM-5.3, Qwen4): the largest sums of relu(q . k) over keys pooled in groups.

Consecutive tokens are a group, counted from the first that is not padding. A query chooses among
the groups that it sees whole, and attends to their tokens and to those behind the last whole one.
What such a forward makes of a token is computed here by its own modules, and verified by a trial.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.hf.chosen_mask import ChosenMask
from headwise.hf.indexed_layers import IndexKeys
from headwise.hf.indexers.cut import Indexer, Taken
from headwise.hf.indexers.trial import causal, rotation, twin_of
from headwise.hf.module_hook import NAME, ModuleHook, makes_graph
from headwise.ops import chosen_mask, index_topk
from headwise.ops.attend.call import Options

_GROUPS = 6  # of a trial


class Runs(NamedTuple):
    """What queries see where it is one run of tokens: from `first` [B] on, `seen` [B,S] of them."""

    first: Tensor
    seen: Tensor


_RUNS = "_headwise_runs"


def runs_of(mask: Tensor) -> Runs | None:
    """The runs of a boolean mask [B,1,S,L] that ends at each query's own token; None of any other.

    Looked at once for all layers that are given the same mask.
    """
    version = None if mask.is_inference() else mask._version  # such a tensor does not count writes
    known = getattr(mask, _RUNS, None)
    if known is not None and version is not None and known[0] == version:
        found: Runs | None = known[1]
        return found
    count = mask[:, 0].sum(dim=-1)
    first = mask[:, 0, -1].int().argmax(dim=-1)
    every = torch.arange(mask.shape[3], device=mask.device)
    stop = (first[:, None] + count)[..., None]
    same = mask[:, 0] == ((every >= first[:, None, None]) & (every < stop))
    # a query whose own token is padding sees nothing; any other sees as many as there are
    runs = Runs(first, count) if bool(same.all()) else None
    setattr(mask, _RUNS, (version, runs))
    return runs


def chosen_groups(query: Tensor, pools: Tensor, weights: Tensor, whole: Tensor, top: int) -> Tensor:
    """int32 [B,S,top]: the best of the `whole` [B,S] groups that each query sees; then -1."""
    visible = torch.arange(pools.shape[1], device=pools.device) < whole.unsqueeze(-1)
    return index_topk(query, pools, weights, top, mask=visible)


def pooled_choice(
    query: Tensor, pools: Tensor, weights: Tensor, runs: Runs, size: int, top: int, *, tail: bool
) -> Tensor:
    """int32 [B,S,top * size + size - 1]: the tokens of the best groups, and those behind; -1 else.

    query [B,S,I,E], pools [B,P,E], weights [B,S,I]; without `tail` none behind the last group.
    """
    whole = runs.seen // size
    within = torch.arange(size, device=pools.device)
    first = runs.first[:, None, None]
    parts = []
    if pools.shape[1]:
        chosen = chosen_groups(query, pools, weights, whole, top).unsqueeze(-1)
        tokens = first.unsqueeze(-1) + chosen * size + within
        parts.append(tokens.masked_fill(chosen < 0, -1).flatten(-2))
    if tail:
        behind = first + (whole * size).unsqueeze(-1) + within[:-1]
        parts.append(behind.masked_fill(within[:-1] >= (runs.seen % size).unsqueeze(-1), -1))
    if not parts:
        return query.new_full((*query.shape[:2], 1), -1, dtype=torch.int32)
    return torch.cat(parts, dim=-1).int()


class PooledIndexer(Indexer):
    """An indexer over groups of keys; those that are whole are pooled once, and kept."""

    def pools(
        self, layer: Any, states: Tensor, runs: Runs, size: int, pool: Callable[..., Tensor]
    ) -> Tensor:
        """Pools [B,P,E] of the tokens' states [B,L,...], as many as the longest run of a query has.

        pool(states [B,p,size,...], first tokens [B,p]) gives p of them. layer: the cache's, where
        it is ours.
        """
        seen = runs.seen.amax(dim=1)
        last = int((runs.first + seen).max()) - 1
        counts = (seen // size).tolist()
        longest, shortest = max(counts, default=0), min(counts, default=0)
        kept = layer.pools(tuple(runs.first.tolist())) if isinstance(layer, IndexKeys) else None
        before = 0 if kept is None or kept.first is None else kept.length
        made = self._pooled(states[:, : last + 1], runs.first, before, longest, size, pool)
        if kept is None:
            return made
        # what is whole in every sequence stays as it is
        whole = made[:, : max(0, shortest - before)].unsqueeze(1)
        held, _ = kept.append(whole, whole[..., :0])
        rest = made[:, max(0, shortest - before) :]
        held = held.squeeze(1)
        return torch.cat([held, rest], dim=1) if rest.shape[1] else held

    @staticmethod
    def _pooled(
        states: Tensor,
        first: Tensor,
        start: int,
        stop: int,
        size: int,
        pool: Callable[..., Tensor],
    ) -> Tensor:
        group = torch.arange(start, max(start, stop), device=states.device)
        begin = first[:, None] + group * size
        token = begin.unsqueeze(-1) + torch.arange(size, device=states.device)
        token = token.clamp(max=states.shape[1] - 1)
        batch = torch.arange(len(first), device=states.device).view(-1, 1, 1)
        return pool(states[batch, token], begin.clamp(max=states.shape[1] - 1))


class GatedPoolIndexer(PooledIndexer):
    """GLM-5.3: keys averaged by gates; int32 [B,S,T], which goes through to the attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The tokens that each query attends to."""
        module, given = self.owner, self.given(args, kwargs)
        mask, cache = given["attention_mask"], given.get(self.cache)
        hidden, residual = given["hidden_states"], given["q_resid"]
        if makes_graph() or not self.is_same(module) or mask.ndim != 2:
            chosen: Tensor = self.stock(**given)
            return chosen
        with torch.no_grad():
            return self._chosen(hidden, residual, mask, cache, given)

    def _chosen(
        self, hidden: Tensor, residual: Tensor, mask: Tensor, cache: Any, given: dict[str, Any]
    ) -> Tensor:
        module, (batch, length, _) = self.owner, hidden.shape
        key = module.k_norm(module.wk(hidden))
        gate = nn.functional.linear(hidden, module.index_kpool_compress_gate)
        valid = mask.to(key.dtype).unsqueeze(-1)
        states = torch.cat([key, gate, valid], dim=-1)
        layer, context = None, length
        if cache is not None:
            layer = cache.layers[module.layer_idx]
            states = cache.update_indexer(states, module.layer_idx)
            context = layer.get_seq_length()
        runs = _left_padded(states[..., -1].bool(), length) if states.shape[1] == context else None
        if runs is None:  # holes, or a static cache
            taken = given if cache is None else {**given, self.cache: Taken(cache, states)}
            stock: Tensor = self.stock(**taken)
            return stock
        query = module.wq_b(residual).view(batch, length, -1, module.head_dim)
        weights = module.weights_proj(hidden.to(module.weights_proj.weight.dtype)).float()
        size, tail = module.index_kpool, module.index_kpool_always_select_tail
        pools = self.pools(layer, states, runs, size, self._pool)
        top = module.index_topk // size
        return pooled_choice(query, pools, weights, runs, size, top, tail=tail)

    def _pool(self, states: Tensor, first: Tensor) -> Tensor:
        module = self.owner
        key, gate, _ = states.split([module.head_dim, module.head_dim, 1], dim=-1)
        gates = (gate.float() + module.index_kpool_compress_ape.float()).softmax(dim=2)
        return (gates.to(key.dtype) * key).sum(dim=2)


def _left_padded(valid: Tensor, length: int) -> Runs | None:
    """The runs of the last `length` tokens of valid [B,L]; None where padding is not in front."""
    context = valid.shape[1]
    first = context - valid.sum(dim=-1)
    position = torch.arange(context, device=valid.device)
    if not bool((valid == (position >= first[:, None])).all()):
        return None
    return Runs(first, (position[-length:] + 1 - first[:, None]).clamp(min=0))


class ChoiceAsMask(ModuleHook):
    """Stands in for `build_attention_mask_from_topk`: a mask that our attention function reads."""

    def __call__(self, topk_indices: Tensor, query_states: Tensor, kv_length: int) -> Tensor:
        """The mask [B,1,S,L] of indices [B,S,T]."""
        module = self.owner
        if module.config._attn_implementation != NAME or torch.compiler.is_compiling():
            mask: Tensor = type(module).build_attention_mask_from_topk(
                module, topk_indices=topk_indices, query_states=query_states, kv_length=kv_length
            )
            return mask
        return ChosenMask(topk_indices, kv_length)


class MeanPoolIndexer(PooledIndexer):
    """Qwen4: keys averaged, then normalised and rotated; a mask of what was chosen."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mask [B,1,S,L] of the tokens that each query attends to."""
        module, given = self.owner, self.given(args, kwargs)
        mask = given["attention_mask"]
        plain = type(mask) is Tensor and mask.dtype == torch.bool and mask.ndim == 4
        runs = None
        if plain and not makes_graph() and self.is_same(module) and mask.shape[1] == 1:
            runs = runs_of(mask)
        if runs is None:
            stock: Tensor = self.stock(**given)
            return stock
        return ChosenMask(*self._chosen(given, runs, mask.shape[3]))

    def _chosen(
        self, given: dict[str, Any], runs: Runs, context: int
    ) -> tuple[Tensor, int, int | None]:
        """What was chosen, L, and the keys of a block, where those are blocks."""
        module, cache, hidden = self.owner, given.get(self.cache), given["hidden_states"]
        batch, length, _ = hidden.shape
        angles = given["position_embeddings"]
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        heads, dim = module.index_n_heads, module.index_head_dim
        query, key = module.index_qk_proj(hidden).split(
            [heads * dim, module.index_kv_heads * dim], dim=-1
        )
        query = module.q_layernorm(query.reshape(batch, length, heads, dim))
        cos, sin = (part[:, -length:] for part in angles)
        query = rotate(query, cos=cos, sin=sin, unsqueeze_dim=2)
        states, layer = key.reshape(batch, length, -1, dim).squeeze(2), None
        if cache is not None:
            layer = cache.layers[module.layer_idx]
            states = cache.update_indexer(states, module.layer_idx)

        def pool(states: Tensor, first: Tensor) -> Tensor:
            key = module.k_layernorm(states.float().mean(dim=2).to(states.dtype))
            rows = torch.arange(batch, device=first.device).unsqueeze(-1)
            cos, sin = (part.expand(batch, -1, -1)[rows, first] for part in angles)
            rotated: Tensor = rotate(key.unsqueeze(2), cos=cos, sin=sin, unsqueeze_dim=2)
            return rotated.squeeze(2)

        size = module.compress_ratio
        pools = self.pools(layer, states, runs, size, pool)
        weights, top = query.new_ones(query.shape[:3], dtype=torch.float32), module.block_topk
        if bool((runs.first % size).any()):
            tokens = pooled_choice(query, pools, weights, runs, size, top, tail=True)
            return tokens, context, None
        # groups are blocks of the cache, the last of which the mask cuts off
        whole, skipped = runs.seen // size, (runs.first // size)[:, None, None].int()
        groups = chosen_groups(query, pools, weights, whole, top)
        groups = (groups + skipped).masked_fill(groups < 0, -1)
        behind = whole.unsqueeze(-1).int() + skipped
        behind = behind.masked_fill((runs.seen % size == 0).unsqueeze(-1), -1)
        return torch.cat([groups, behind], dim=-1), context, size


def gated_difference(module: Any) -> str | None:
    """How its choice differs from that of gated pools; None if it does not."""
    size = module.index_kpool
    tokens, padding = _GROUPS * size + size // 2 + 2, 2
    twin, random = twin_of(module, index_topk=2 * size)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, :padding] = False
    hook = GatedPoolIndexer(twin)
    given = {
        "hidden_states": random(1, tokens, module.wk.in_features),
        "q_resid": random(1, tokens, module.wq_b.in_features),
        "attention_mask": mask,
        hook.cache: None,
    }
    theirs, ours = (
        chosen_mask(Options(scale=1.0, indices=indices.unsqueeze(1)), 1, tokens)
        for indices in (hook.stock(**given), hook(**given))
    )
    assert theirs is not None
    assert ours is not None
    # nothing reads what a query of padding attends to
    if not torch.equal(theirs[:, :, padding:], ours[:, :, padding:]):
        return "its indexer chooses otherwise than by keys that are pooled with gates"
    return None


def mean_difference(module: Any) -> str | None:
    """How its choice differs from that of averaged pools; None if it does not."""
    size = 3
    tokens, padding = _GROUPS * size + 2, 2
    twin, random = twin_of(module, compress_ratio=size, token_budget=2 * size, block_topk=2)
    mask = causal(tokens).unsqueeze(1)
    mask[..., :padding] = False
    hook = MeanPoolIndexer(twin)
    given = {
        "hidden_states": random(1, tokens, module.index_qk_proj.in_features),
        "position_embeddings": rotation(random, tokens, module.index_head_dim),
        "attention_mask": mask,
        hook.cache: None,
    }
    if not torch.equal(hook.stock(**given), hook(**given) & mask):
        return "its indexer chooses otherwise than by averages of keys"
    return None


POOLED = ((gated_difference, GatedPoolIndexer), (mean_difference, MeanPoolIndexer))
