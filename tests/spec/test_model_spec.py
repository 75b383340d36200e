"""ModelSpec and LayerSpec: sums over layers, grouping, and what they refuse."""

import subprocess
import sys
from dataclasses import replace

import pytest

import headwise
from headwise.errors import ShapeError, SpecError
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec, StateSpec, Uncovered

FULL = AttentionSpec(heads=6, kv_heads=3, head_dim=11, value_dim=7)
LOCAL = AttentionSpec(heads=6, kv_heads=2, head_dim=11, value_dim=7, window=13)
CROSS = AttentionSpec(heads=5, kv_heads=5, head_dim=3, value_dim=3, causal=False, cross=True)
BOTH_SIDES = AttentionSpec(heads=5, kv_heads=5, head_dim=3, value_dim=3, causal=False)


def make(*layers, **changes):
    fields = {"family": "test", "layers": tuple(layers), "max_context": None}
    return ModelSpec(**(fields | changes))


def test_cache_bytes_add_full_local_and_missing_attention():
    spec = make(LayerSpec(0, FULL), LayerSpec(1, LOCAL), LayerSpec(2, Uncovered("convolution")))
    assert spec.cache_bytes(100, batch=5, dtype="float32") == 5 * 4 * (100 * 54 + 12 * 36)
    assert spec.cache_bytes_per_token("float32") == 4 * (54 + 36)


def test_cache_bytes_add_cross_attention_at_the_encoders_length():
    spec = make(LayerSpec(0, FULL, CROSS), LayerSpec(1, FULL, CROSS))
    assert spec.cache_bytes(100, encoder_context=17) == 2 * 2 * (100 * 54 + 17 * 30)
    assert spec.cache_bytes_per_token() == 2 * 2 * 54


def test_encoder_context_is_needed_with_cross_attention_and_refused_without():
    with pytest.raises(ShapeError, match="encoder_context is missing"):
        make(LayerSpec(0, FULL, CROSS)).cache_bytes(100)
    with pytest.raises(ShapeError, match="encoder_context=17"):
        make(LayerSpec(0, FULL)).cache_bytes(100, encoder_context=17)


def test_a_negative_context_is_refused_even_where_no_layer_attends():
    with pytest.raises(ShapeError, match="context=-1"):
        make(LayerSpec(0, Uncovered("convolution"))).cache_bytes(-1)


def test_an_encoder_costs_no_cache():
    spec = ModelSpec.from_config({"model_type": "bert"})
    assert (spec.layers, len(spec.encoder_layers)) == ((), 12)
    assert spec.cache_bytes(512) == spec.cache_bytes_per_token() == 0


def test_layer_groups_collect_equal_layers_wherever_they_are():
    spec = make(LayerSpec(0, LOCAL), LayerSpec(1, FULL), LayerSpec(2, LOCAL))
    assert spec.layer_groups() == (
        (LayerSpec(0, LOCAL), (0, 2)),
        (LayerSpec(1, FULL), (1,)),
    )


def test_text_says_what_the_stacks_are_made_of():
    spec = ModelSpec.from_config({"model_type": "t5"})
    assert str(spec) == (
        "t5, any context: "
        "encoder 6 x MHA 8 heads, D 64, bidirectional, relative bias | "
        "decoder 6 x MHA 8 heads, D 64, relative bias; MHA 8 heads, D 64, cross"
    )
    mixed = make(LayerSpec(0, FULL), LayerSpec(1, Uncovered("convolution")), max_context=43)
    assert str(mixed) == ("test, context up to 43: 1 x GQA 6/3 heads, D 11, V 7 + 1 x convolution")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: make(), "layers is empty"),
        (lambda: make(LayerSpec(1, FULL)), "layers have the indices"),
        (lambda: make(encoder_layers=(LayerSpec(2, BOTH_SIDES),)), "encoder_layers have"),
        (lambda: make(LayerSpec(0, FULL), max_context=0), "max_context=0"),
        (lambda: LayerSpec(-1, FULL), "index=-1"),
        (lambda: LayerSpec(0, Uncovered("")), "reason is empty"),
        (lambda: LayerSpec(0, "attention"), "mixer is a str in layer 0"),
        (lambda: LayerSpec(0, CROSS), "attention="),
        (lambda: LayerSpec(0, FULL, FULL), "cross_attention="),
    ],
)
def test_layers_in_the_wrong_place_are_named(build, named):
    with pytest.raises(SpecError, match=named):
        build()


def test_the_spec_floor_imports_neither_torch_nor_transformers():
    # A bare package stands in for headwise, whose own __init__ imports the floors above as well.
    code = (
        "import sys, types\n"
        "package = types.ModuleType('headwise')\n"
        f"package.__path__ = {list(headwise.__path__)!r}\n"
        "sys.modules['headwise'] = package\n"
        "import headwise.spec\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("missing", ["heads", "key_dim", "value_dim"])
def test_a_state_has_matrices_whole_or_not_at_all(missing):
    convolution = StateSpec(conv_channels=5, conv_width=3)
    assert (convolution.nbytes(2, "bf16"), convolution.flops(4, 4)) == (2 * 5 * 3 * 2, 0)
    sizes = {"heads": 2, "key_dim": 3, "value_dim": 4, missing: 0}
    with pytest.raises(SpecError, match=f"{missing}=0"):
        StateSpec(conv_channels=5, conv_width=3, **sizes)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({}, "gated delta rule"),
        ({"decay": "dim"}, "Kimi delta attention"),
        ({"delta": False}, "state-space duality"),
        ({"delta": False, "decay": "dim"}, "gated linear attention"),
        ({"delta": False, "decay": "fixed"}, "retention"),
    ],
)
def test_a_state_is_named_by_its_rule_and_decay(kind, words):
    state = StateSpec(heads=6, key_dim=3, value_dim=4, **kind)
    assert str(state) == f"{words} 6 heads, state 3 x 4"
    assert (state.query_heads, state.nbytes(2, "bf16")) == (6, 2 * 6 * 3 * 4 * 4)
    assert state == replace(state, key_heads=6)
    assert str(replace(state, key_heads=2)) == f"{words} 6/2 heads, state 3 x 4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_heads": 4}, "key_heads=4 with heads=6"),
        ({"key_heads": -1}, "key_heads=-1"),
        ({"decay": "token"}, "decay='token': expected 'fixed', 'head' or 'dim'"),
        ({"decay": "fixed"}, "decay='fixed' with delta=True"),
        ({"conv_width": 4}, "conv_channels=0"),
        ({"conv_channels": 4}, "conv_width=0"),
        ({"heads": 0, "key_dim": 0, "value_dim": 0}, "conv_channels=0"),
    ],
)
def test_a_state_that_cannot_be_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        StateSpec(**{"heads": 6, "key_dim": 3, "value_dim": 4} | fields)


def test_the_old_fields_of_a_layer_are_taken_with_a_warning():
    state = StateSpec(conv_channels=2, conv_width=2, heads=1, key_dim=3, value_dim=3)
    for old, mixer in (
        ({"attention": FULL}, FULL),
        ({"attention": None, "note": "convolution"}, Uncovered("convolution")),
        ({"note": str(state), "state": state}, state),
    ):
        with pytest.warns(DeprecationWarning, match="use LayerSpec.mixer"):
            layer = LayerSpec(0, **old)
        assert layer == LayerSpec(0, mixer)
    with pytest.warns(DeprecationWarning, match="mixer"), pytest.raises(SpecError, match="one of"):
        LayerSpec(0, FULL, state=state)
    with pytest.warns(DeprecationWarning, match="mixer"):
        assert replace(LayerSpec(0, FULL), attention=LOCAL) == LayerSpec(0, LOCAL)
    with pytest.warns(DeprecationWarning, match="mixer"):
        assert replace(LayerSpec(0, FULL), attention=None, note="x") == LayerSpec(0, Uncovered("x"))
    with pytest.warns(DeprecationWarning, match=r"LayerSpec\.note"):
        assert LayerSpec(0, state).note == str(state)
    with pytest.warns(DeprecationWarning, match=r"LayerSpec\.state"):
        assert LayerSpec(0, FULL).state is None
