"""The keys that an indexer chooses: those of a sort of scores computed number by number."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import ShapeError
from headwise.ops import index_topk
from headwise.ops.backend import cpu
from headwise.ops.indexer import reference

assert cpu.available()[0], cpu.available()[1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_hand(query, key, weights, top, causal, mask):
    """Loops over queries and keys; whole numbers, so that every order of a sum gives the same."""
    batch, length, heads, _ = query.shape
    context = key.shape[1]
    mask = torch.ones(1, 1, 1, dtype=torch.bool) if mask is None else mask
    mask = mask.expand(batch, length, context)
    chosen = torch.full((batch, length, min(top, context)), -1, dtype=torch.int32)
    for b, s in itertools.product(range(batch), range(length)):
        scores = []
        for j in range(context):
            if mask[b, s, j] and not (causal and j > context - length + s):
                score = 0.0
                for i in range(heads):
                    dot = sum(x * y for x, y in zip(query[b, s, i].tolist(), key[b, j].tolist()))
                    score += float(weights[b, s, i]) * max(0.0, dot)
                scores.append((-score, j))
        best = sorted(j for _, j in sorted(scores)[:top])
        chosen[b, s, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_the_choice_is_that_of_loops_over_numbers_ties_and_all(data, dtype):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    batch, length = data.draw(st.sampled_from([1, 2, 0])), data.draw(st.sampled_from([1, 3, 0]))
    heads, dim = data.draw(st.sampled_from([1, 5, 17])), data.draw(st.sampled_from([1, 4, 9]))
    context, top = data.draw(st.integers(0, 70)), data.draw(st.sampled_from([1, 2, 8, 100]))

    def whole(*size):
        return torch.randint(-2, 3, size).to(dtype)

    query, key = whole(batch, length, heads, dim), whole(batch, context, dim)
    if data.draw(st.booleans()):
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    weights, mask = whole(batch, length, heads), None
    causal = data.draw(st.booleans())
    if data.draw(st.booleans()):
        rows = data.draw(st.sampled_from([1, length]))
        mask = torch.rand(data.draw(st.sampled_from([1, batch])), rows, context) < 0.7
    expected = by_hand(query, key, weights, top, causal, mask)
    given = index_topk(query, key, weights, top, causal=causal, mask=mask)
    assert torch.equal(given, expected)
    known = reference.index_topk(query, key, weights, min(top, context), causal=causal, mask=mask)
    assert torch.equal(known, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context_is_chosen_from_in_parts_as_at_once(dtype, level, threads):
    torch.manual_seed(0)
    query, key = torch.randn(1, 300, 16, 32).to(dtype), torch.randn(1, 20_000, 32).to(dtype)
    weights = torch.rand(1, 300, 16)
    threads(2)
    chosen = index_topk(query, key, weights, 500, causal=True)
    threads(1)
    assert torch.equal(index_topk(query, key, weights, 500, causal=True), chosen)
    for row in (0, 150, 299):
        one = slice(row, row + 1)
        stop = 20_000 - 299 + row
        own = index_topk(query[:, one], key[:, :stop], weights[:, one], 500, causal=True)
        assert torch.equal(own, chosen[:, one])
        score = (query[0, row].double() @ key[0, :stop].double().T).relu().T @ weights[
            0, row
        ].double()
        taken = score[chosen[0, row].long()]
        left = score.index_fill(0, chosen[0, row].long(), float("-inf"))
        assert taken.min() > left.max() - 1e-5 * score.abs().max()


def test_it_passes_opcheck_and_compiles():
    query, key, weights = torch.randn(2, 3, 4, 8), torch.randn(2, 20, 8), torch.rand(2, 3, 4)
    mask = torch.rand(2, 3, 20) < 0.8
    level = torch.ops.headwise.best_level()
    arguments = (query, key, weights, mask, True, 6, level)
    torch.library.opcheck(torch.ops.headwise.index_topk.default, arguments)
    compiled = torch.compile(index_topk, fullgraph=True, backend="aot_eager")
    chosen = index_topk(query, key, weights, 6, mask=mask)
    assert torch.equal(compiled(query, key, weights, 6, mask=mask), chosen)


BAD = {
    "three dims": ({"query": torch.zeros(2, 3, 8)}, "query has shape [2, 3, 8], expected 4 dims"),
    "another batch": (
        {"key": torch.zeros(1, 20, 8)},
        "key has shape [1, 20, 8], expected [B, L, E]",
    ),
    "another dim": ({"key": torch.zeros(2, 20, 9)}, "key has shape [2, 20, 9], expected [B, L, E]"),
    "another dtype": ({"key": torch.zeros(2, 20, 8).half()}, "key has dtype torch.float16"),
    "weights of keys": ({"weights": torch.zeros(2, 3, 20)}, "weights has shape [2, 3, 20]"),
    "whole weights": ({"weights": torch.zeros(2, 3, 4).int()}, "of a floating dtype"),
    "none": ({"top": 0}, "top is 0, expected an int of at least 1"),
    "half": ({"top": 2.5}, "top is 2.5, expected an int"),
    "float mask": ({"mask": torch.zeros(2, 3, 20)}, "expected a boolean tensor on cpu"),
    "another mask": (
        {"mask": torch.zeros(2, 3, 19, dtype=torch.bool)},
        "mask has shape [2, 3, 19], expected one that broadcasts to [B, S, L] = [2, 3, 20]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_in_one_line(name):
    changes, message = BAD[name]
    good = {
        "query": torch.zeros(2, 3, 4, 8),
        "key": torch.zeros(2, 20, 8),
        "weights": torch.zeros(2, 3, 4),
        "top": 5,
    }
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        index_topk(**(good | changes))
    assert "\n" not in str(caught.value)
