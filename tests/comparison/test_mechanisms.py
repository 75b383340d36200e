"""Mechanisms by name, and decoders of equal size around them."""

import pytest
import torch

from headwise import AttentionSpec, OptionError
from headwise.comparison import Configuration
from headwise.comparison.models import build, feed_forward
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


@pytest.mark.parametrize("name", ["gqa:2", "mqa", "mla", "mla:8"])
def test_every_decoder_has_as_many_parameters_as_the_one_with_mha(name: str) -> None:
    asked = Configuration()
    sizes = [
        sum(weight.numel() for weight in build(asked, each, seed=0).parameters())
        for each in ("mha", name)
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
