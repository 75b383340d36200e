"""Shapes: the syntax, and what is counted from it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.bench.peers import all_peers
from headwise.bench.presets import PRESETS, select_shapes
from headwise.errors import OptionError
from headwise.measure import parse_shape
from headwise.measure.inputs import make_inputs


@pytest.mark.parametrize(
    "text",
    [preset.shape for preset in PRESETS] + ["decode:6/2:d16/24:47:b3:s5", "mla:7:r32+8:d0/24:41"],
)
def test_a_shape_is_what_its_text_says(text: str) -> None:
    assert parse_shape(str(parse_shape(text))) == parse_shape(text)


def test_every_part_is_read() -> None:
    shape = parse_shape("decode:14/7:d11/13:3k:b5:s2:ragged")
    spec = shape.spec
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim) == (14, 7, 11, 13)
    assert (shape.context, shape.batch, shape.query_length, shape.ragged) == (3072, 5, 2, True)
    latent = parse_shape("mla:3:r29+2:d17/19:101").spec
    assert (latent.latent_rank, latent.rope_dim, latent.nope_dim, latent.value_dim) == (
        29,
        2,
        17,
        19,
    )
    assert parse_shape("prefill:3:d7:53").query_length == 53


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fly:4:d8:64", "starts with 'fly'; expected kind"),
        ("decode:4:d8", "has no context"),
        ("decode:d8:64", "has no context"),
        ("decode:4:64", "has no dims"),
        ("decode:4:d8:64:x", "unknown part 'x'"),
        ("decode:4:d8:64:99", "two parts for context"),
        ("decode:4:d8:64:r8+2", "latent rank; expected it for mla only"),
        ("decode:32/7:d8:64", "kv_heads=7 does not divide heads=32"),
        ("decode:4:d8:8:s9", "9 queries on 8 tokens"),
        ("decode:4:d8:64:ragged", "ragged needs several sequences"),
        ("decode:4:d8:64:b0", "batch is 0"),
        ("decode:4:d8:64:vs1t:vs32", "give one of ragged"),
        ("prefil", "unknown; use one of llama3-decode"),
    ],
)
def test_a_bad_shape_is_one_line(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        select_shapes([text])
    assert text in str(caught.value) or text.split(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ragged_lengths_are_unequal_and_hold_as_many_tokens_as_equal_ones() -> None:
    shape = parse_shape("decode:4:d8:37:b5:ragged")
    assert len(set(shape.lengths)) == 5
    assert shape.tokens == 5 * 37
    assert shape.beside(2).shape.tokens == shape.tokens


@pytest.mark.parametrize("text", ["decode:6/2:d16:47:b3", "decode:6/2:d16/24:47:s5", "mla:7:41"])
def test_bytes_are_those_of_the_tensors(text: str) -> None:
    shape = parse_shape(text)
    inputs = make_inputs(shape, torch.bfloat16)
    out = shape.batch * shape.spec.heads * shape.query_length * shape.spec.value_dim * 2
    assert shape.bytes(2) == out + sum(tensor.nbytes for tensor in inputs.tensors)


def test_flops_of_absorbed_decoding_are_those_that_pytorch_counts() -> None:
    shape = parse_shape("mla:7:r32+8:d16/24:41")
    inputs = make_inputs(shape, torch.float32)
    run = all_peers()["matmul"].build(inputs)(inputs)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == shape.flops


def test_flops_of_a_causal_prefill_count_what_is_seen() -> None:
    shape = parse_shape("prefill:3:d5/7:11")
    pairs = int(torch.ones(11, 11).tril().sum())
    assert shape.flops == 2 * 3 * pairs * (5 + 7)


def test_asked_dtypes_replace_the_presets_own() -> None:
    assert [dtype for _, dtype in select_shapes(["llama3-decode"], ["float16"])] == ["float16"]
    assert len(select_shapes(["llama3-decode"])) == 3


def test_a_mask_is_made_only_where_sdpa_needs_one() -> None:
    def mask(text: str) -> torch.Tensor | None:
        return make_inputs(parse_shape(text), torch.float32).mask

    assert mask("decode:4:d8:16") is None
    assert mask("prefill:4:d8:16") is None
    assert mask("decode:4:d8:16:s3").tolist()[0][0] == [
        [key <= query for key in range(16)] for query in (13, 14, 15)
    ]
    lengths = mask("decode:4:d8:16:b4:ragged")
    assert lengths.sum(dim=-1).flatten().tolist() == [4, 12, 20, 28]
