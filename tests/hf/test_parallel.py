"""Contexts over several processes: the tokens of one, a part of the cache in each, and ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise
import parallel_cases as cases
from families import make
from headwise.hf.parallel.ranks import Ranks
from parallel_cases import BATCH, FAMILIES, MASK, MODES, PROMPT
from ranks import Group


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.sweep)])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with Group(request.param, block=4) as made:
        yield made


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    with Group(2) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_the_tokens_of_one_process(family: str, group: Group) -> None:
    for mode in MODES:
        expected = cases.tokens(family, mode)
        assert len(set(expected.flatten().tolist())) > 3, "a constant output would prove nothing"
        for given in group.run(cases.tokens, family, mode):
            assert torch.equal(given, expected), mode


@pytest.mark.parametrize("cache", ["int8", "int4", "paged:4", "int8:4"])
@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_other_caches_are_spread_too(family: str, cache: str, pair: Group) -> None:
    mode = "left-padded batch" if cache == "int8" else "several turns"
    expected = cases.tokens(family, mode, cache=cache)
    for given in pair.run(cases.tokens, family, mode, cache=cache):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_its_part_and_all_have_the_same_logits(family: str, group: Group) -> None:
    count, rows = len(group.pipes), PROMPT.repeat(1, 5)
    expected, _, whole = cases.forward(family, rows)
    windows = [type(each.cache).__name__ == "WindowCache" for each in _layers(family)]
    results = group.run(cases.forward, family, rows)
    for logits, _, held in results:
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(logits, results[0][0])
        for window, own, every in zip(windows, held, whole, strict=True):
            block = every // rows.shape[1] * 4
            assert own == every if window else own <= every / count + block
    for index, window in enumerate(windows):
        if not window:
            assert sum(held[index] for _, _, held in results) == whole[index]


def _layers(family: str) -> list[Any]:
    model = cases.attached(family)
    with torch.no_grad():
        layers: list[Any] = model(PROMPT, use_cache=True).cache.layers
    return layers


def test_what_is_not_ours_gets_all_rows_gathered(pair: Group) -> None:
    expected, weights, _ = cases.forward("llama-gqa", BATCH, MASK, output_attentions=True)
    for logits, own, _ in pair.run(cases.forward, "llama-gqa", BATCH, MASK, output_attentions=True):
        torch.testing.assert_close(logits[MASK == 1], expected[MASK == 1], atol=1e-3, rtol=1e-3)
        for one, other in zip(own, weights, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_long_blocks_leave_a_rank_without_any(pair: Group) -> None:
    expected, _, _ = cases.forward("deepseek_v3", PROMPT)  # of 19 tokens, in blocks of 64
    results = pair.run(cases.forward, "deepseek_v3", PROMPT)
    for logits, _, held in results:
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        assert held == (results[0][2] if logits is results[0][0] else [0, 0, 0])


def test_every_rank_draws_what_the_first_draws(pair: Group) -> None:
    one, other = pair.run(cases.drawn_unlike, "llama-gqa")
    assert torch.equal(one, other)
    torch.manual_seed(5)
    expected = cases.attached("llama-gqa").generate(
        PROMPT, max_new_tokens=cases.NEW_TOKENS, do_sample=True
    )
    assert torch.equal(one, expected)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ids", "input_ids of rank 1 differ"),
        ("mask", "attention_mask of rank 1 differ"),
        ("use_cache", "the arguments of the call of rank 1 differ"),
        ("model", "the weights of rank 1 differ"),
        ("cache", "the options of attach of rank 1 differ"),
    ],
)
def test_ranks_that_are_given_something_else_all_say_so(what: str, words: str, pair: Group) -> None:
    pair.begin(cases.unlike, what)
    for rank in range(2):
        error = pair.result(rank)
        assert isinstance(error, headwise.RankError), error
        assert words in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama-gqa", {"sparse": "topk:128"}, "OptionError: sparse needs a whole context"),
        ("llama-gqa", {"remember": True}, "OptionError: remember needs a whole context"),
        ("llama-gqa", {"cache": "window:16"}, "OptionError: cache is 'window:16', which drops"),
        ("mistral", {}, "has no layer that holds every token"),
        ("falcon-7b", {}, "not on Transformers' attention interface"),
        ("t5", {}, "has an encoder"),
        ("bert", {}, "has no cache that grows"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    family: str, options: dict[str, Any], words: str, pair: Group
) -> None:
    for said in pair.run(cases.refused, family, **options):
        assert words in said
        assert "\n" not in said


@pytest.mark.parametrize("given", ["world", 2, object()])
def test_what_is_no_group_is_refused(given: Any) -> None:
    with pytest.raises(headwise.OptionError, match="expected a DeviceMesh or a ProcessGroup"):
        Ranks.of(given)


def test_a_mesh_of_one_dim_is_a_group(pair: Group) -> None:
    refusal, words, given, after = pair.run(cases.of_meshes)[1]
    assert "a mesh of 2 dims" in refusal
    assert (
        words == "contiguous, grown in place, of which this is rank 1 of 2, in blocks of 64 tokens"
    )
    expected = cases.tokens("llama-gqa", "one sequence")
    assert torch.equal(given, expected)
    assert torch.equal(after, expected)


def test_a_part_is_neither_saved_nor_pickled_and_copies_are_whole(pair: Group) -> None:
    for saved, pickled in pair.run(cases.kept_and_copied):
        assert "spread over 2 processes" in saved
        assert "cannot be pickled" in pickled


def test_weights_that_are_spread_already_are_refused() -> None:
    model = make("llama-gqa")
    model._tp_size = 2  # as from_pretrained(tp_plan="auto") leaves it
    with Group(1) as alone:
        assert "tensor parallelism" in alone.run(cases.refused_model, model)[0]


@pytest.mark.parametrize("ends", [True, False], ids=["dies", "stalls"])
def test_a_rank_that_ends_or_stalls_ends_the_others(ends: bool) -> None:
    with Group(2, timeout=3.0) as short:
        short.run(cases.tokens, "llama-gqa", "one sequence")
        short.begin(cases.waits, 1, 60.0)
        if ends:
            short.kill(1)
        error = short.result(0)
        assert isinstance(error, headwise.RankError), error
        assert "rank 0 of 2 waited for the others of its context in vain" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "gemma3"])
def test_a_plan_says_what_a_rank_holds_and_sends(family: str, group: Group, tmp_path: Path) -> None:
    length, batch, count = 40, 2, len(group.pipes)
    model = cases.attached(family)
    model.config.save_pretrained(tmp_path)
    from headwise.caches import split
    from headwise.planning import plan

    before, split.BLOCK = split.BLOCK, 4
    try:
        planned = plan(
            *(str(tmp_path),),
            context=length,
            batch=batch,
            ranks=count,
            dtype="float32",
            bandwidth=1e9,
            peak=1e11,
        )
    finally:
        split.BLOCK = before
    results = group.run(cases.sent, family, length, batch)
    assert planned.ranks is not None
    assert planned.ranks.cache_bytes == max(held for held, _ in results)
    assert planned.ranks.sent_bytes == results[0][1]
