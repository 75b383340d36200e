"""The keys that weigh most by a sketch: those of softmax weights computed over its own numbers."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise
from headwise import ShapeError
from headwise.caches import PagedCache, QuantizedCache
from headwise.ops import (
    Budget,
    add_rest,
    choose_keys,
    dequantize,
    means_of,
    means_under,
    sketch_of,
)
from headwise.ops.backend import cpu
from headwise.ops.sketch import reference
from headwise.ops.sketch.call import ChoiceCall

assert cpu.available()[0], cpu.available()[1]


def weights_of(query, sketch, seen, *, softcap=None, sinks=None):
    """Weights [B,H,S,L] in float64, loops over heads; `seen` [B,S,L]."""
    batch, heads, length, dim = query.shape
    key = dequantize(sketch.key, sketch.key_scales, 4).double()
    group = heads // key.shape[1]
    total = torch.zeros(batch, heads, length, key.shape[2], dtype=torch.float64)
    for b, h, s in itertools.product(range(batch), range(heads), range(length)):
        score = key[b, h // group] @ query[b, h, s].double() * dim**-0.5
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        score[~seen[b, s]] = float("-inf")
        powers = torch.exp(score - score.max()) if seen[b, s].any() else torch.zeros_like(score)
        sink = torch.exp(sinks[h].double() - score.max()) if sinks is not None else 0.0
        total[b, h, s] = powers / (powers.sum() + sink) if seen[b, s].any() else 0.0
    return total


def check(found, weights, seen, budget):
    """A choice holds what it must, and no key that was left out weighs more than one that is in.

    The rest is what each head gives the keys that were left out.

    Weights may differ by what rounding queries to 8 bits changes in a score.
    """
    slack, (chosen, rest) = 1.04, found
    assert chosen.shape[3] == min(budget.most, seen.shape[2])
    each_head = weights
    weights = weights.unflatten(1, (chosen.shape[1], -1)).sum(dim=2)
    for b, h, s in itertools.product(*map(range, rest.shape)):
        own = chosen[b, h // (rest.shape[1] // chosen.shape[1]), s]
        left = each_head[b, h, s].sum() - each_head[b, h, s, own[own >= 0].long()].sum()
        assert abs(float(rest[b, h, s]) - float(left)) <= (slack - 1) * float(left) + 0.02
    for b, k, s in itertools.product(*map(range, chosen.shape[:3])):
        visible = seen[b, s].nonzero().flatten().tolist()
        places = [place for place in chosen[b, k, s].tolist() if place >= 0]
        assert chosen[b, k, s, len(places) :].eq(-1).all()
        assert places == sorted(set(places))
        assert set(places) <= set(visible)
        certain = {*visible[: budget.first], *visible[max(0, len(visible) - budget.recent) :]}
        assert certain <= set(places)
        own = weights[b, k, s]
        free = [float(own[place]) for place in places if place not in certain]
        left = [float(own[place]) for place in visible if place not in places]
        if budget.mass is None:
            assert len(places) == min(budget.most, len(visible))
        else:
            assert min(budget.least, len(visible)) <= len(places) <= budget.most
            mass = sum(float(own[place]) for place in places)
            wanted = budget.mass * float(own.sum())
            if len(places) < min(budget.most, len(visible)):
                assert mass * slack >= wanted
            if len(places) > max(budget.least, len(certain)):
                assert mass - min(free) <= wanted * slack
        if free and left:
            assert max(left) <= min(free) * slack + 1e-30


@given(data=st.data())
def test_the_choice_is_that_of_weights_in_float64(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    batch, length = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3]))
    kv_heads, group = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 2, 7]))
    dim = data.draw(st.sampled_from([2, 6, 20, 64, 80, 160]))
    context = data.draw(st.sampled_from([1, 5, 40, 300]))
    most = data.draw(st.sampled_from([1, 4, 37, 400]))
    first = data.draw(st.integers(0, most // 3))
    mass = data.draw(st.sampled_from([None, 0.2, 0.9, 1.0]))
    budget = Budget(most, data.draw(st.integers(0, most)), mass, first, most // 4)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    query = torch.randn(batch, kv_heads * group, length, dim).to(dtype)
    sketch = sketch_of(torch.randn(batch, kv_heads, context, dim) * 2)
    causal, mask, sinks, softcap = data.draw(st.booleans()), None, None, None
    seen = torch.ones(batch, length, context, dtype=torch.bool)
    if causal:
        seen &= torch.ones(length, context, dtype=torch.bool).tril(context - length)
    if data.draw(st.booleans()):
        mask = torch.rand(batch, 1, data.draw(st.sampled_from([1, length])), context) < 0.6
        seen &= mask[:, 0]
    if data.draw(st.booleans()):
        sinks = torch.randn(kv_heads * group)
    if data.draw(st.booleans()):
        softcap = 1.5
    options = {"causal": causal, "mask": mask, "sinks": sinks, "softcap": softcap}
    weights = weights_of(query, sketch, seen, softcap=softcap, sinks=sinks)
    check(choose_keys(query, sketch, budget, **options), weights, seen, budget)
    budget = budget.within(context)
    call = ChoiceCall(query, sketch, budget, dim**-0.5, softcap, sinks, causal, mask)
    check(reference.choose_keys(call), weights, seen, budget)


@pytest.mark.parametrize("mass", [None, 0.8])
def test_a_long_context_is_chosen_from_in_parts_as_at_once(mass, level, threads):
    torch.manual_seed(0)
    query = torch.randn(2, 6, 16, 128, dtype=torch.bfloat16)
    sketch = sketch_of(torch.randn(2, 2, 20_000, 128))
    budget = Budget(700, 100, mass, 4, 64)
    threads(2)
    chosen, rest = choose_keys(query, sketch, budget)
    threads(1)
    assert all(map(torch.equal, choose_keys(query, sketch, budget), (chosen, rest)))
    for row in (0, 9, 15):
        stop = 20_000 - 15 + row
        own = sketch_of(torch.zeros(2, 2, stop, 128))
        own.key, own.key_scales = sketch.key[:, :, :stop], sketch.key_scales[:, :, :stop]
        one = choose_keys(query[:, :, row : row + 1], own, budget)
        both = chosen[:, :, row : row + 1], rest[:, :, row : row + 1]
        assert all(map(torch.equal, one, both))
    seen = torch.ones(1, 1, 20_000, dtype=torch.bool)
    first = sketch_of(torch.zeros(1, 1, 20_000, 128))
    first.key, first.key_scales = sketch.key[:1, :1], sketch.key_scales[:1, :1]
    weights = weights_of(query[:1, :3, 15:], first, seen)
    check((chosen[:1, :1, 15:], rest[:1, :3, 15:]), weights, seen, budget)


def test_pages_and_lengths_choose_as_rows_side_by_side(level):
    torch.manual_seed(1)
    pages, rows = PagedCache(16, bits=4), QuantizedCache(4)
    tokens = [torch.randn(2, 2, 90, 64) for _ in range(2)]
    pages.append(*tokens, counts=[90, 61])
    rows.append(*tokens)
    query, budget = torch.randn(2, 4, 2, 64), Budget(20, first=2, recent=4)
    chosen, rest = choose_keys(query, pages.view, budget)
    whole = choose_keys(query, rows.view, budget)
    assert torch.equal(chosen[0], whole[0][0]) and torch.equal(rest[0], whole[1][0])
    held = QuantizedCache(4)
    held.append(*(each[1:, :, 29:] for each in tokens))
    alone = choose_keys(query[1:], held.view, budget)
    assert torch.equal(chosen[1:], alone[0]) and torch.equal(rest[1:], alone[1])


def test_what_is_no_number_is_chosen_and_seen():
    torch.manual_seed(2)
    query, key = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 3000, 32)
    key[0, 0, 1234, 3] = float("nan")
    chosen, _ = choose_keys(query, sketch_of(key), Budget(50))
    assert 1234 in chosen[0, 0, 0].tolist()
    out = headwise.attention(query, key, key, causal=True, indices=chosen)
    assert out.isnan().all()


def test_a_choice_of_every_key_gives_the_attention_of_all():
    torch.manual_seed(3)
    query, key, value = torch.randn(1, 4, 2, 64), *(torch.randn(1, 2, 200, 64) for _ in range(2))
    chosen, rest = choose_keys(query, sketch_of(key), Budget(200))
    assert rest.max() < 1e-5
    dense = headwise.attention(query, key, value, causal=True)
    sparse = headwise.attention(query, key, value, causal=True, indices=chosen)
    torch.testing.assert_close(sparse, dense)


def test_the_rest_counts_by_the_mean_of_all_values():
    """Where all values that were not chosen are one, the result is that of dense attention."""
    torch.manual_seed(4)
    query, key = torch.randn(1, 4, 2, 64), torch.randn(1, 2, 300, 64)
    exact = sketch_of(key)
    key = dequantize(exact.key, exact.key_scales, 4)
    value = torch.randn(1, 2, 1, 8).expand(1, 2, 300, 8)
    chosen, rest = choose_keys(query, exact, Budget(30))
    out = headwise.attention(query, key, value, causal=True, indices=chosen)
    out = add_rest(out, rest, means_of(value, 2))
    dense = headwise.attention(query, key, value, causal=True)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
    assert rest.min() > 0.05
    mask = torch.rand(1, 1, 2, 300) < 0.5
    seen = mask & torch.ones(2, 300, dtype=torch.bool).tril(298)
    value = torch.randn(1, 2, 300, 8)
    by_hand = [(value * seen[:, :, s, :, None]).sum(2) / seen[0, 0, s].sum() for s in (0, 1)]
    torch.testing.assert_close(means_under(seen, value), torch.stack(by_hand, dim=2))
    plain = torch.stack([value[:, :, :299].mean(2), value.mean(2)], dim=2)
    torch.testing.assert_close(means_of(value, 2), plain)
    sums = value[:, :, :200].sum(2)
    torch.testing.assert_close(means_of(value[:, :, 200:], 2, sums, 200), plain)


def test_it_passes_opcheck_and_compiles():
    query, sketch = torch.randn(2, 4, 3, 64), sketch_of(torch.randn(2, 2, 50, 64))
    mask = torch.rand(2, 1, 3, 50) < 0.8
    level = torch.ops.headwise.best_level()
    rest = (None, 0, None, mask, torch.randn(4), True, 0.1, 0.0, 1, 2, 4, 9, 0.5, level)
    arguments = (query, sketch.key, sketch.key_scales, *rest)
    torch.library.opcheck(torch.ops.headwise.choose_keys.default, arguments)

    def choose(query):
        return choose_keys(query, sketch, Budget(9), mask=mask)

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(query), choose(query)))


SKETCH = sketch_of(torch.zeros(1, 2, 20, 8))
QUERY = torch.zeros(1, 4, 1, 8)
BAD = {
    "a tensor": ((QUERY, torch.zeros(1, 2, 20, 8), Budget(5)), "sketch is Tensor, expected"),
    "8 bits": (
        (
            QUERY,
            QuantizedCache(8).append(torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8)),
            Budget(5),
        ),
        "sketch is of 8 bits, expected a QuantKV of 4 bits",
    ),
    "another dim": ((torch.zeros(1, 4, 1, 6), SKETCH, Budget(5)), "B and D must agree"),
    "three heads": ((torch.zeros(1, 3, 1, 8), SKETCH, Budget(5)), "and K divide H"),
    "none": ((QUERY, SKETCH, Budget(0)), "Budget(most=0"),
    "more first than most": ((QUERY, SKETCH, Budget(5, first=3, recent=3)), "expected counts"),
    "mass": ((QUERY, SKETCH, Budget(5, mass=1.5)), "mass is 1.5, expected a part of the weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_in_one_line(name):
    arguments, said = BAD[name]
    with pytest.raises(ShapeError, match=re.escape(said)) as error:
        choose_keys(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 1, 20), torch.zeros(3, 20, dtype=torch.bool)], ids=str
)
def test_a_bad_mask_is_refused(mask):
    with pytest.raises(ShapeError, match=r"^mask "):
        choose_keys(QUERY, SKETCH, Budget(5), mask=mask)


def test_a_page_that_does_not_exist_is_refused():
    cache = PagedCache(16, bits=4)
    view = cache.append(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    view.page_table = torch.full_like(view.page_table, 99)
    with pytest.raises(ShapeError, match="names pages 99 to 99"):
        choose_keys(QUERY, view, Budget(5))
