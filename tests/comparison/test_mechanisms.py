"""Mechanisms by name, and decoders of equal size around them."""

from dataclasses import replace

import pytest
import torch

from headwise import AttentionSpec, OptionError
from headwise.comparison import Configuration
from headwise.comparison.models import build, feed_forward
from headwise.comparison.speed import bytes_per_token, filled
from headwise.nn import Memory
from headwise.spec.mechanism import mechanism_name, with_mechanism


def parse(name: str, heads: int, dim: int) -> AttentionSpec:
    plain = AttentionSpec(heads=heads, kv_heads=heads, head_dim=dim, value_dim=dim)
    return with_mechanism(plain, name)


def test_a_name_gives_the_spec_that_it_says() -> None:
    shared = {"heads": 6, "head_dim": 20, "value_dim": 20}
    assert parse("mha", 6, 20) == AttentionSpec(kv_heads=6, **shared)
    assert parse("gqa:3", 6, 20) == AttentionSpec(kv_heads=3, **shared)
    assert parse("mqa", 6, 20) == AttentionSpec(kv_heads=1, **shared)


def test_mla_has_the_proportions_of_deepseek_v2() -> None:
    # 128 dims beside 64 rotated ones, values of 128, a latent of 512
    spec = parse("mla", 128, 128)
    assert (spec.head_dim, spec.value_dim, spec.latent_rank, spec.rope_dim) == (192, 128, 512, 64)


def test_mla_with_a_number_has_that_latent() -> None:
    assert parse("mla:24", 4, 16).latent_rank == 24


@pytest.mark.parametrize("name", ["gqa:3", "mla:24"])
def test_the_old_spelling_is_the_same_mechanism(name: str) -> None:
    old = name.replace(":", "-")
    assert parse(old, 6, 20) == parse(name, 6, 20)
    assert (mechanism_name(old), mechanism_name(name)) == (name, name)
    assert Configuration(heads=6, width=72, mechanisms=(old,)).mechanisms == (name,)


def test_a_name_that_is_none_keeps_its_spelling() -> None:
    assert [mechanism_name(name) for name in ("mha-2", "gqa-", "gqa-x")] == [
        "mha-2",
        "gqa-",
        "gqa-x",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlaa", "did you mean mla?"),
        ("GQA", "did you mean gqa:2?"),
        ("gqa:x", "did you mean gqa:2?"),
        ("linear", "Known are mha, gqa:K, mqa, mla, mla:R"),
        ("gqa:4", "gqa:4 has 4 kv heads, which do not divide 6 heads; use one of gqa:1, gqa:2"),
        ("gqa:0", "gqa:0 has 0 kv heads"),
        ("mla:0", "mla:0 has a latent of 0, expected at least 1"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_what_can(name: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(name, 6, 20)
    assert message in str(caught.value)


STATES = {
    "gated-delta": "gated delta rule 8 heads, state 8 x 8",
    "kda": "Kimi delta attention 8 heads, state 8 x 8",
    "ssd": "state-space duality 8/1 heads, state 16 x 8",
    "retention": "retention 4 heads, state 16 x 32",
}
MANY = ("mha", "gqa:4", "gqa:2", "mqa", "mla", *STATES, "hybrid:3-1", "hybrid:1-1")


def test_states_have_the_heads_of_attention() -> None:
    asked = Configuration()
    assert {name: str(asked.mixers(name)[1]) for name in STATES} == STATES


def test_a_hybrid_repeats_its_pattern() -> None:
    asked = Configuration(layers=6, mechanisms=("hybrid:3-1", "hybrid:1-2"))
    delta, mha = (asked.mixers(name)[0] for name in ("gated-delta", "mha"))
    assert asked.mixers("hybrid:3-1") == (delta, delta, delta, mha, delta, delta)
    assert asked.mixers("hybrid:1-2") == (delta, mha, mha) * 2
    assert [type(each) for each in build(asked, "hybrid:1-2", 0).specs] == [
        type(delta),
        type(mha),
        type(mha),
    ] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hybrid:3-1", "hybrid:3-1 repeats 4 layers, and layers is 2; give as many or more"),
        ("hybrid:0-1", "expected hybrid:A-B with A and B"),
        ("hybrid", "expected hybrid:A-B"),
        ("gated-dleta", "did you mean gated-delta?"),
        ("linear", "mla, mla:R (K kv heads, a latent of R), gated-delta, kda, ssd, retention, top"),
        ("gqq:2", "did you mean gqa:2?"),
    ],
)
def test_a_mechanism_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Configuration(mechanisms=(name,))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", MANY)
def test_at_equal_bytes_all_layers_hold_as_much(name: str) -> None:
    asked = Configuration(mechanisms=(name,), equal="bytes", layers=4)
    model = build(asked, name, seed=0)
    held = [cache.nbytes for cache in filled(model, asked.tokens)]
    quarter = 2 * 64 * 4 * 128 // 4
    # half a row of a state is the most that rounding leaves
    for spec, nbytes in zip(model.specs, held, strict=True):
        assert abs(nbytes - quarter) <= 2 * spec.heads * spec.value_dim * 4
    assert sum(held) == asked.sequence_bytes(name)
    if "gqa" in name or name in ("mha", "mqa", "mla"):
        assert set(held) == {quarter}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"equal": "flops"}, "equal is 'flops', expected parameters or bytes"),
        ({"mechanisms": ("mla:8",)}, "mla:8 at equal bytes: expected mla"),
        ({"width": 32}, "mha at equal bytes has 1 dims of a head, expected an even number; give a"),
        (
            {"pairs": 1, "mechanisms": ("kda",)},
            "kda at equal bytes holds 1,536 bytes at best, expected 512; give longer sequences",
        ),
    ],
)
def test_equal_bytes_that_cannot_be_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Configuration(**{"equal": "bytes", "mechanisms": ("mha",)} | changed)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "grows"), [*((name, 0) for name in STATES), ("hybrid:1-1", 2 * 64 * 4)]
)
def test_a_state_holds_nothing_for_a_token(name: str, grows: int) -> None:
    asked = Configuration(mechanisms=(name,))
    model = build(asked, name, seed=0)
    assert bytes_per_token(model, filled(model, 9)) == grows
    assert sum(cache.nbytes for cache in filled(model, 128)) == asked.sequence_bytes(name)


@pytest.mark.parametrize("equal", ["parameters", "bytes"])
@pytest.mark.parametrize("name", [*MANY[1:], "mla:8"])
def test_every_decoder_has_as_many_parameters_as_the_one_with_mha(name: str, equal: str) -> None:
    if (name, equal) == ("mla:8", "bytes"):
        return  # its latent would not be 8
    asked = Configuration(layers=4)
    sizes = [
        sum(weight.numel() for weight in build(each, mechanism, seed=0).parameters())
        for each, mechanism in ((asked, "mha"), (replace(asked, equal=equal), name))
    ]
    # half an inner width is the most that rounding leaves
    assert abs(sizes[0] - sizes[1]) <= 3 * asked.width * asked.layers / 2


def test_shared_weights_start_equal_and_differ_between_seeds() -> None:
    asked = Configuration()
    mha, mqa, other = (
        build(asked, name, seed).state_dict() for name, seed in (("mha", 5), ("mqa", 5), ("mqa", 6))
    )
    for name in ("embedding.weight", "blocks.1.attention.q_proj.weight"):
        assert torch.equal(mha[name], mqa[name])
        assert not torch.equal(mqa[name], other[name])


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build(Configuration(), "mla", seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_latent_larger_than_the_whole_decoder_is_refused() -> None:
    with pytest.raises(OptionError, match="mla:2000 has more parameters than a whole decoder"):
        feed_forward(Configuration(), "mla:2000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mechanisms": ("hybrid:0-1",)}, "expected hybrid:A-B with A and B of 1 to 99"),
        ({"mechanisms": ("mla",), "equal": "bytes", "heads": 1}, "mla at equal bytes has"),
    ],
)
def test_what_cannot_be_compared_says_what_to_give(settings, message) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Configuration(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["window", "window:3", "memory", "memory:3"])
def test_a_window_and_a_memory_have_the_tokens_that_they_say(name: str) -> None:
    asked = Configuration(task="beyond", mechanisms=(name,))
    model = build(asked, name, seed=0)
    window = 3 if name.endswith("3") else 128 // 8
    assert {spec.window for spec in model.specs} == {window}
    held = sum(cache.nbytes for cache in filled(model, 128))
    token = 2 * 64 * 4  # a key and a value of 64 float32
    memories = [each for each in model.modules() if isinstance(each, Memory)]
    assert held == 2 * (window - 1) * token
    assert [each.rows for each in memories] == ([128] * 2 if "memory" in name else [])
    assert held + sum(each.nbytes for each in memories) == asked.sequence_bytes(name)
    grows = 2 * token if memories else 0
    assert bytes_per_token(model, filled(model, 9)) == grows


def test_a_window_is_an_eighth_of_the_longest_sequence_by_default() -> None:
    asked = Configuration(mechanisms=("window", "memory"), pairs=16)
    assert asked.mixers("window") == asked.mixers("window:8")
    assert asked.mixers("memory") == asked.mixers("memory:8") != asked.mixers("window")
    with pytest.raises(OptionError, match="window:8 is the same as window"):
        Configuration(mechanisms=("window", "window:8"), pairs=16)
    with pytest.raises(OptionError, match="memory at equal bytes"):
        Configuration(mechanisms=("memory",), equal="bytes")
    with pytest.raises(OptionError, match="mechanism 'window:0' is unknown"):
        Configuration(mechanisms=("window:0",))
