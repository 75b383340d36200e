"""A damaged config is read or refused in one line, never a traceback of our own."""

import pytest

from headwise.errors import SpecError
from headwise.spec import AttentionSpec, ModelSpec
from headwise.spec.checks import shown
from spec.damaged import damaged

LONGEST = 700


def len_of(size):
    return f"{size.bit_length()} bits"


def test_every_damaged_config_is_read_or_refused_in_one_line():
    read, refused = 0, []
    for config in damaged(seed=19, count=2000):
        try:
            spec = ModelSpec.from_config(config)
        except SpecError as error:
            refused.append(str(error))
            continue
        encoder = 7 if spec.has_cross_attention else None
        assert spec.cache_bytes(100, 2, "bf16", encoder) >= 0
        assert "\n" not in str(spec)
        read += 1
    # neither all nothing nor all refused, or the cases say little
    assert read > 500 and len(refused) > 500
    assert [line for line in refused if "\n" in line or len(line) >= LONGEST] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**6000, "<int, too long to print>"),
        ("a\nb" * 99, "..."),
        ([["x"]] * 999, "..."),
    ],
    ids=["digits", "lines", "list"],
)
def test_a_value_is_shown_on_one_short_line(value, text):
    assert text in shown(value)
    assert "\n" not in shown(value) and len(shown(value)) <= 100


@pytest.mark.parametrize("size", [10**18, 10**400, 10**6000], ids=len_of)
def test_a_size_beyond_any_model_is_refused(size):
    for name in ("heads", "head_dim", "window", "latent_rank"):
        given = {"heads": 4, "kv_heads": 4, "head_dim": 8, "value_dim": 8} | {name: size}
        with pytest.raises(SpecError, match=name):
            AttentionSpec(**given)
    with pytest.raises(SpecError, match="head_dim"):
        ModelSpec.from_config({"model_type": "glm", "head_dim": size})


def test_layer_types_of_lists_are_named():
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "layer_types": [["x"], "attention"]}
    with pytest.raises(SpecError, match=r"layer_types contains \['x'\]"):
        ModelSpec.from_config(config)
