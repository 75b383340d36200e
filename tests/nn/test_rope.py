"""Rotary embedding: the angles of Transformers, and what makes it an embedding of positions."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import headwise
from headwise.nn import LinearScaling, Llama3Scaling, Rope, YarnScaling

DEEPSEEK = {"mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
SCALINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        Llama3Scaling(8.0, 8192),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        YarnScaling(16.0, 4096),
    ),
    "yarn of gpt-oss": (
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        YarnScaling(32.0, 4096, truncate=False),
    ),
    "yarn of DeepSeek": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096} | DEEPSEEK,
        YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.707),
    ),
    "yarn with a factor of its own": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 1.25,
        },
        YarnScaling(4.0, 2048, attention_factor=1.25),
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim", [64, 128])
def test_frequencies_are_those_of_transformers(name: str, dim: int) -> None:
    given, scaling = SCALINGS[name]
    config = LlamaConfig(
        head_dim=dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **given},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"))
    rope = Rope(dim, theta=500000.0, scaling=scaling)
    torch.testing.assert_close(rope.frequencies, expected, rtol=1e-6, atol=0)
    assert rope.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    rope = Rope(16, interleaved=interleaved).double()
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [
        (rope(query, torch.tensor([at + 5])) * rope(key, torch.tensor([at]))).sum().item()
        for at in (0, 7, 300)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)


def test_a_pair_turns_by_position_times_frequency() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    for interleaved, other in ((False, 2), (True, 1)):
        turned = Rope(4, interleaved=interleaved)(x, torch.tensor([3])).flatten()
        expected = torch.zeros(4)
        expected[0], expected[other] = math.cos(3), math.sin(3)
        torch.testing.assert_close(turned, expected)


def test_both_layouts_are_one_embedding_of_reordered_elements() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = Rope(8)(x[..., order], positions)
    assert torch.equal(Rope(8, interleaved=True)(x, positions)[..., order], halves)


def test_elements_behind_the_rotated_ones_stay() -> None:
    x = torch.randn(1, 2, 5, 12)
    turned = Rope(8)(x, torch.arange(5))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], Rope(8)(x[..., :8], torch.arange(5)))


def test_positions_of_each_sequence() -> None:
    x, rope = torch.randn(2, 3, 4, 8), Rope(8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    turned = rope(x, positions)
    for index in range(2):
        assert torch.equal(turned[index], rope(x[index : index + 1], positions[index])[0])


def test_frequencies_stay_in_float32_and_off_the_state_dict() -> None:
    rope = Rope(64)
    exact = rope.frequencies.clone()
    assert torch.equal(rope.bfloat16().frequencies, exact)
    assert not rope.state_dict()
    with torch.device("meta"):
        empty = Rope(64)
    assert torch.equal(empty.to_empty(device="cpu").frequencies, exact)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rope(7), headwise.OptionError, "dim is 7, expected an even number"),
        (lambda: Rope(8.0), headwise.OptionError, "dim is 8.0"),
        (lambda: Rope(8, theta=1.0), headwise.OptionError, "theta is 1.0"),
        (lambda: Rope(8, scaling={}), headwise.OptionError, "scaling is a dict"),
        (lambda: LinearScaling(0), headwise.OptionError, "factor is 0, expected"),
        (lambda: LinearScaling(math.nan), headwise.OptionError, "factor is nan"),
        (lambda: Llama3Scaling(8, 8192, 1.0, 1.0), headwise.OptionError, "above 1"),
        (lambda: YarnScaling(8, 0), headwise.OptionError, "original_context is 0"),
        (
            lambda: Rope(8)(torch.randn(1, 1, 2, 6), torch.arange(2)),
            headwise.ShapeError,
            "last dim of 6, expected at least 8",
        ),
        (
            lambda: Rope(8)(torch.randn(1, 1, 2, 8), torch.arange(3)),
            headwise.ShapeError,
            r"positions have shape \[3\], expected \[S\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
