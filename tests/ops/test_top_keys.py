"""Exact search: the keys of a sort of scores that are computed number by number."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import ShapeError
from headwise.ops import top_keys
from headwise.ops.backend import cpu
from headwise.ops.top_keys import reference

assert cpu.available()[0], cpu.available()[1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_hand(query, key, top, mask):
    """Loops over queries and keys; whole numbers, so that every order of a sum gives the same."""
    batch, heads, length, _ = query.shape
    kv_heads, context = key.shape[1:3]
    mask = torch.ones(1, 1, dtype=torch.bool) if mask is None else mask
    mask = mask.expand(batch, context)
    chosen = torch.full((batch, heads, length, min(top, context)), -1, dtype=torch.int32)
    for b, h, s in itertools.product(range(batch), range(heads), range(length)):
        own = key[b, h // (heads // kv_heads)].tolist()
        scores = [
            (-sum(x * y for x, y in zip(query[b, h, s].tolist(), own[j])), j)
            for j in range(context)
            if mask[b, j]
        ]
        best = sorted(j for _, j in sorted(scores)[:top])
        chosen[b, h, s, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_the_choice_is_that_of_loops_over_numbers_ties_and_all(data, dtype):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    batch, length = data.draw(st.sampled_from([1, 2, 0])), data.draw(st.sampled_from([1, 3, 7, 0]))
    kv_heads, group = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3]))
    dim, context = data.draw(st.sampled_from([1, 4, 9])), data.draw(st.integers(0, 70))
    top = data.draw(st.sampled_from([1, 2, 8, 100]))

    def whole(*size):
        return torch.randint(-2, 3, size).to(dtype)

    query, key = whole(batch, kv_heads * group, length, dim), whole(batch, kv_heads, context, dim)
    if data.draw(st.booleans()):
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if data.draw(st.booleans()):
        key = torch.cat([key, key], dim=2)[:, :, :context]
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(data.draw(st.sampled_from([1, batch])), context) < 0.7
    expected = by_hand(query, key, top, mask)
    assert torch.equal(top_keys(query, key, top, mask=mask), expected)
    known = reference.top_keys(query, key, min(top, context), mask=mask)
    assert torch.equal(known, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 8, 67])
def test_many_keys_are_chosen_from_in_parts_as_at_once(dtype, length, level, threads):
    torch.manual_seed(0)
    query, key = torch.randn(1, 6, length, 40).to(dtype), torch.randn(1, 3, 30_011, 40).to(dtype)
    mask = torch.rand(1, 30_011) < 0.9
    threads(2)
    chosen = top_keys(query, key, 37, mask=mask)
    threads(1)
    assert torch.equal(top_keys(query, key, 37, mask=mask), chosen)
    assert bool(mask[0, chosen.long()].all())
    assert bool((chosen.diff(dim=-1) > 0).all())
    score = query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    score = score.masked_fill(~mask, float("-inf"))
    taken = score.gather(-1, chosen.long())
    left = score.scatter(-1, chosen.long(), float("-inf"))
    # sums of 40 products in float32
    slack = 40 * 2**-24 * query.double().norm(dim=-1) * key.double().norm(dim=-1).max()
    assert bool((taken.amin(-1) > left.amax(-1) - 2 * slack).all())


@pytest.mark.parametrize("length", [1, 20])
def test_keys_in_the_order_of_their_scores_are_found(length, level):
    # every key is larger than all before it: each list is full again and again
    key = torch.arange(20_000.0).view(1, 1, -1, 1).expand(1, 1, 20_000, 3)
    query = torch.ones(1, 1, length, 3)
    assert top_keys(query, key, 5)[0, 0, -1].tolist() == [*range(19_995, 20_000)]
    assert top_keys(-query, key, 5)[0, 0, -1].tolist() == [*range(5)]


@pytest.mark.parametrize("length", [1, 20])
def test_nan_is_larger_than_all_and_minus_infinity_is_not_chosen(length, level):
    key = torch.randn(1, 1, 700, 8)
    query = torch.ones(1, 1, length, 8)
    key[0, 0, 600] = float("nan")
    key[0, 0, 300, 2] = float("-inf")
    assert bool((top_keys(query, key, 3) == 600).any(dim=-1).all())
    everything = top_keys(query, key, 700)
    assert everything[0, 0, -1, :-1].tolist() == [j for j in range(700) if j != 300]
    assert bool((everything[..., -1] == -1).all())


def test_scores_of_all_keys_never_exist_at_once():
    from headwise.measure.memory import peak_memory

    query, key = torch.randn(1, 8, 512, 32), torch.randn(1, 2, 65_536, 32)
    top_keys(query[:, :, :1], key, 32)
    _, peak = peak_memory(lambda: top_keys(query, key, 32))
    # all scores would take a GiB
    assert peak is None or peak < 2**26


def test_it_passes_opcheck_and_compiles():
    query, key = torch.randn(2, 6, 3, 8), torch.randn(2, 3, 20, 8)
    mask = torch.rand(2, 20) < 0.8
    level = torch.ops.headwise.best_level()
    torch.library.opcheck(torch.ops.headwise.top_keys.default, (query, key, mask, 6, level))
    compiled = torch.compile(top_keys, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, 6, mask=mask), top_keys(query, key, 6, mask=mask))


@pytest.mark.parametrize(
    "changes",
    [
        {"query": torch.zeros(2, 6, 3, 9)},
        {"query": torch.zeros(2, 5, 3, 8)},
        {"query": torch.zeros(2, 6, 3, 8, dtype=torch.float64)},
        {"key": torch.zeros(2, 3, 20, 16)[..., ::2]},
        {"mask": torch.ones(2, 19, dtype=torch.bool)},
        {"mask": torch.ones(2, 20)},
        {"top": 21},
        {"level": 99},
    ],
)
def test_the_native_operator_checks_all_it_is_given(changes):
    good = {
        "query": torch.zeros(2, 6, 3, 8),
        "key": torch.zeros(2, 3, 20, 8),
        "mask": None,
        "top": 5,
        "level": torch.ops.headwise.best_level(),
    }
    with pytest.raises(RuntimeError, match="headwise::top_keys"):
        torch.ops.headwise.top_keys.default(*(good | changes).values())


BAD = {
    "three dims": ({"query": torch.zeros(2, 3, 8)}, "query has shape [2, 3, 8], expected 4 dims"),
    "another batch": ({"key": torch.zeros(1, 3, 20, 8)}, "key has shape [1, 3, 20, 8], expected"),
    "another dim": ({"key": torch.zeros(2, 3, 20, 9)}, "key has shape [2, 3, 20, 9], expected"),
    "heads": ({"key": torch.zeros(2, 4, 20, 8)}, "K that divides 6"),
    "another dtype": ({"key": torch.zeros(2, 3, 20, 8).half()}, "key has dtype torch.float16"),
    "none": ({"top": 0}, "top is 0, expected an int of at least 1"),
    "half": ({"top": 2.5}, "top is 2.5, expected an int"),
    "float mask": ({"mask": torch.zeros(2, 20)}, "expected a boolean tensor on cpu"),
    "another mask": (
        {"mask": torch.zeros(2, 19, dtype=torch.bool)},
        "mask has shape [2, 19], expected [B or 1, L] = [2, 20]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_in_one_line(name):
    changes, message = BAD[name]
    good = {"query": torch.zeros(2, 6, 3, 8), "key": torch.zeros(2, 3, 20, 8), "top": 5}
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        top_keys(**(good | changes))
    assert "\n" not in str(caught.value)
