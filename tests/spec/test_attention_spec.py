"""AttentionSpec: what it derives, and what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import ShapeError, SpecError
from headwise.spec import AttentionSpec

GROUPED = "GQA 6/3 heads, D 11, V 7"


def make(**changes):
    return AttentionSpec(**({"heads": 6, "kv_heads": 3, "head_dim": 11, "value_dim": 7} | changes))


def make_mla(**changes):
    fields = {
        "heads": 5,
        "kv_heads": 5,
        "head_dim": 19,
        "value_dim": 23,
        "latent_rank": 37,
        "rope_dim": 7,
        "query_rank": 29,
    }
    return AttentionSpec(**(fields | changes))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mechanism", "group_size"),
    [(6, 6, "MHA", 1), (6, 3, "GQA", 2), (6, 1, "MQA", 6), (1, 1, "MHA", 1)],
)
def test_mechanism_follows_from_the_head_counts(heads, kv_heads, mechanism, group_size):
    spec = make(heads=heads, kv_heads=kv_heads)
    assert (spec.mechanism, spec.group_size) == (mechanism, group_size)


def test_a_latent_makes_it_mla():
    assert make_mla().mechanism == "MLA"
    assert make_mla().nope_dim == 12


def test_cached_elements_count_keys_and_values_or_latent_and_rope_key():
    assert make().cache_elements_per_token == 3 * (11 + 7)
    assert make_mla().cache_elements_per_token == 37 + 7


def test_absorbed_mla_is_mqa_over_the_latent_with_the_same_scale():
    absorbed = make_mla(scale=0.3, softcap=17.0, window=13).absorbed()
    assert absorbed == AttentionSpec(
        heads=5, kv_heads=1, head_dim=44, value_dim=37, scale=0.3, softcap=17.0, window=13
    )
    assert absorbed.mechanism == "MQA"


def test_a_latent_that_is_no_part_of_the_keys_is_left_out_of_the_absorbed_key():
    spec = make_mla(head_dim=7)
    assert (spec.nope_dim, spec.cache_elements_per_token) == (0, 37 + 7)
    assert (spec.absorbed().head_dim, spec.absorbed().value_dim) == (7, 37)
    assert spec.absorbed().flops(1, 11) == 2 * 5 * 11 * (7 + 37)


@pytest.mark.parametrize("ask", [AttentionSpec.absorbed, lambda spec: spec.nope_dim])
def test_only_mla_can_be_absorbed(ask):
    with pytest.raises(SpecError, match="latent_rank"):
        ask(make())


def test_scale_left_out_is_stored_as_the_inverse_root_of_head_dim():
    assert make(head_dim=16).scale == 0.25
    assert make(head_dim=16, scale=None) == make(head_dim=16, scale=0.25)
    assert isinstance(make(scale=1).scale, float)


def test_a_causal_window_caches_what_the_next_token_needs():
    spec = make(window=13)
    assert [spec.cached_tokens(n) for n in (0, 11, 12, 13, 900)] == [0, 11, 12, 12, 12]
    assert make(window=1).cached_tokens(900) == 0


def test_bidirectional_layers_cache_nothing_and_cross_layers_all_encoder_tokens():
    assert make(causal=False).cached_tokens(900) == 0
    assert make(causal=False, window=13).cached_tokens(900) == 0
    assert make(causal=False, cross=True).cached_tokens(900) == 900


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bf16", 2), ("bfloat16", 2), ("float32", 4), ("half", 2), ("float8_e4m3fn", 1)]
    + [(dtype, dtype.itemsize) for dtype in (torch.bfloat16, torch.float16, torch.float64)],
)
def test_cache_bytes_take_a_dtype_or_its_name(dtype, size):
    assert make().cache_bytes(17, batch=5, dtype=dtype) == 5 * 17 * 54 * size


@pytest.mark.parametrize("dtype", ["bf17", torch.int8, torch.complex64, None])
def test_an_unknown_dtype_is_named(dtype):
    with pytest.raises(SpecError, match=r"dtype=.*expected"):
        make().cache_bytes(17, dtype=dtype)


@pytest.mark.parametrize(("context", "batch"), [(-1, 1), (1.5, 1), (True, 1), (3, 0), (3, -2)])
def test_cache_bytes_refuse_impossible_lengths(context, batch):
    with pytest.raises(ShapeError, match=r"(context|batch)=.*expected an integer"):
        make().cache_bytes(context, batch)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (make(head_dim=64, value_dim=64, heads=9), "GQA 9/3 heads, D 64"),
        (make(heads=12, kv_heads=12, value_dim=11), "MHA 12 heads, D 11"),
        (make(kv_heads=1), "MQA 6/1 heads, D 11, V 7"),
        (make_mla(heads=16, kv_heads=16, latent_rank=512), "MLA 16 heads, R 512 + P 7"),
        (make(window=5, softcap=50, sinks=True), f"{GROUPED}, window 5, softcap 50, sinks"),
        (make(causal=False, relative_bias=True), f"{GROUPED}, bidirectional, relative bias"),
        (make(causal=False, cross=True), f"{GROUPED}, cross"),
        (make(alibi=True, qk_norm=True), f"{GROUPED}, ALiBi, qk-norm"),
        (make(window=9, chunked=True), f"{GROUPED}, chunks of 9"),
    ],
)  # fmt: skip
def test_text_is_short_and_names_what_is_special(spec, text):
    assert str(spec) == text


def test_chunks_are_counted_as_their_mask_shows_them():
    spec = make(window=5, chunked=True)
    position = torch.arange(23)
    mask = position[:, None] >= position
    mask &= position[:, None] // 5 == position // 5
    for queries in (1, 4, 23):
        assert spec.pairs(queries, 23) == mask[23 - queries :].sum()
    assert (spec.cached_tokens(4), spec.cached_tokens(23)) == (4, 4)


def test_specs_are_frozen_keyword_only_and_usable_as_keys():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().heads = 3
    with pytest.raises(TypeError):
        AttentionSpec(6, 3, 11, 7)
    assert {make(): "same"}[make()] == "same"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_heads": 4}, "kv_heads=4"),
        ({"kv_heads": 12}, "kv_heads=12"),
        ({"cross": True}, "cross=True"),
        ({"cross": True, "causal": False, "window": 5}, "window=5"),
        ({"chunked": True}, "chunked=True with window=None"),
        ({"chunked": True, "window": 5, "causal": False}, "causal=False"),
        ({"rope_dim": 7}, "rope_dim=7"),
        ({"query_rank": 29}, "query_rank=29"),
        ({"latent_rank": 37, "kv_heads": 6}, "rope_dim=None"),
        ({"latent_rank": 37, "rope_dim": 7}, "kv_heads=3"),
        ({"latent_rank": 37, "rope_dim": 12, "kv_heads": 6}, "rope_dim=12 is above head_dim=11"),
    ],
)
def test_fields_that_contradict_each_other_are_named(changes, named):
    with pytest.raises(SpecError, match=named):
        make(**changes)


NOT_POSITIVE_INTEGERS = st.one_of(
    st.integers(max_value=0), st.floats(), st.booleans(), st.text(max_size=3)
)
SIZES = ["heads", "kv_heads", "head_dim", "value_dim"]
OPTIONAL_SIZES = ["window", "latent_rank", "rope_dim", "query_rank"]
FLAGS = ["causal", "chunked", "sinks", "alibi", "relative_bias", "qk_norm", "cross"]


@given(st.sampled_from(SIZES + OPTIONAL_SIZES), NOT_POSITIVE_INTEGERS)
def test_any_size_that_is_not_a_positive_integer_is_refused_by_name(field, value):
    with pytest.raises(SpecError, match=f"^{field}="):
        make(**{field: value})


@given(
    st.sampled_from(["scale", "softcap"]),
    st.one_of(
        st.floats(max_value=0.0),
        st.sampled_from([float("nan"), float("inf"), 10**400, True, "0.5", 1j]),
    ),
)
def test_any_factor_that_is_not_finite_and_positive_is_refused_by_name(field, value):
    with pytest.raises(SpecError, match=f"^{field}="):
        make(**{field: value})


@given(st.sampled_from(FLAGS), st.one_of(st.none(), st.integers(), st.text(max_size=3)))
def test_any_flag_that_is_not_a_bool_is_refused_by_name(field, value):
    with pytest.raises(SpecError, match=f"^{field}="):
        make(**{field: value})


@given(
    st.fixed_dictionaries(
        {name: st.integers(-1, 12) for name in SIZES},
        optional={name: st.one_of(st.none(), st.integers(-1, 12)) for name in OPTIONAL_SIZES}
        | {name: st.booleans() for name in FLAGS},
    )
)
def test_every_spec_either_holds_its_invariants_or_is_refused(fields):
    try:
        spec = AttentionSpec(**fields)
    except SpecError:
        return
    assert spec.group_size * spec.kv_heads == spec.heads
    assert spec.mechanism in ("MHA", "MQA", "GQA", "MLA")
    assert (spec.mechanism == "MLA") == (fields.get("latent_rank") is not None)
    assert 0 <= spec.cached_tokens(50) <= 50
    assert spec.cached_tokens(49) <= spec.cached_tokens(50)
    if spec.mechanism == "MLA":
        assert spec.nope_dim + spec.rope_dim == spec.head_dim
        content = spec.latent_rank if spec.nope_dim else 0
        assert spec.absorbed().head_dim == content + spec.rope_dim
