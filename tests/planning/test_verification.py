"""What a plan predicts is what a cache takes, to the byte, in every family that attach supports."""

from typing import Any

import pytest
import transformers as hf

from families import ENCODERS, FAMILIES, GENERATORS, VOCABULARY, make
from headwise import OptionError, UnsupportedError
from headwise.planning import plan, verify
from headwise.planning.cached import CacheFormat
from headwise.planning.decode_times import check_times
from headwise.planning.kernel_rates import _GROUPS, KernelRates, _shapes
from headwise.planning.model import PlannedModel, find_model
from headwise.planning.named_models import named_models
from headwise.planning.reduced import reduced
from headwise.planning.verification import check_caches
from headwise.planning.workload import Workload
from headwise.spec import ModelSpec

_LINEAR = ["linear_attention"]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}
# Families that are attached in part or not at all, whose caches are of more than one kind.
_OTHERS: dict[str, Any] = {
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **_COMMON,
        num_hidden_layers=5,
        head_dim=10,
        layer_types=[
            f"{kind}_attention" for kind in ["linear", "full", "linear", "full", "linear"]
        ],
        mlp_only_layers=[0, 1, 2, 3, 4],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    ),
    "deepseek_v32": lambda: hf.DeepseekV32Config(
        **_COMMON | {"num_key_value_heads": 6},
        num_hidden_layers=2,
        kv_lora_rank=20,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=14,
        mlp_layer_types=["dense", "dense"],
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **_COMMON,
        num_hidden_layers=5,
        head_dim=10,
        global_head_dim=14,
        num_global_key_value_heads=3,
        attention_k_eq_v=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=10,
        attention_chunk_size=7,
        intermediate_size_mlp=64,
        num_local_experts=2,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **_COMMON,
        hybrid_override_pattern="M-*M",
        head_dim=10,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=6,
        n_groups=2,
    ),
    "lfm2": lambda: hf.Lfm2Config(**_COMMON, num_hidden_layers=3, full_attn_idxs=[1]),
    "whisper": lambda: hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        pad_token_id=0,
    ),
}
_CONTEXT = 41


def model_of(config: Any) -> PlannedModel:
    fields = config.to_dict()
    return PlannedModel(config.model_type, ModelSpec.from_config(config), fields)


def checked(model: PlannedModel, cache: CacheFormat, context: int = _CONTEXT) -> dict[str, Any]:
    encoder = 19 if model.spec.has_cross_attention else 0
    checks = check_caches(model, Workload(cache, context, 2, encoder))
    return {check.name: (check.predicted, check.measured) for check in checks}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", GENERATORS)
def test_every_family_that_attach_supports(family: str, bits: Any) -> None:
    model = model_of(make(family).config)
    found = checked(model, CacheFormat("float32", bits))
    assert len(found) == 3
    for name, (predicted, measured) in found.items():
        assert (name, predicted) == (name, measured)
    if bits is None:
        assert found["needed"][0] == model.spec.cache_bytes(
            _CONTEXT, 2, "float32", 19 if model.spec.has_cross_attention else None
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", _OTHERS)
def test_caches_of_more_than_one_kind(family: str, dtype: str) -> None:
    found = checked(model_of(_OTHERS[family]()), CacheFormat(dtype))
    assert len(found) == 3
    for name, (predicted, measured) in found.items():
        assert (name, predicted) == (name, measured)


@pytest.mark.parametrize("context", [2, 6, 7, 8, 150])
@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "falcon-40b"])
def test_whatever_the_context(family: str, context: int) -> None:
    for predicted, measured in checked(
        model_of(make(family).config), CacheFormat("float32"), context
    ).values():
        assert predicted == measured


def test_a_decoder_that_is_given_an_encoders_output() -> None:
    config = make("gpt2", add_cross_attention=True).config
    for predicted, measured in checked(model_of(config), CacheFormat("float32")).values():
        assert predicted == measured


def test_encoders_have_nothing_to_verify() -> None:
    assert set(ENCODERS) == {"bert", "roberta"}
    assert set(FAMILIES) == {*GENERATORS, *ENCODERS}
    with pytest.raises(UnsupportedError, match="caches nothing"):
        verify(plan("bert-base", device="h100"))
    with pytest.raises(OptionError, match="the plan is for H100 SXM"):
        verify(plan("gpt2", device="h100"))


@pytest.mark.parametrize("name", [name for name in named_models() if "palm" not in name])
def test_a_reduced_model_has_every_kind_of_layer(name: str) -> None:
    model = find_model(name)
    small = reduced(model)

    def kinds(spec: ModelSpec) -> set[Any]:
        layers = (*spec.layers, *spec.encoder_layers)
        return {(at.mixer, at.cross_attention, at.shares is None) for at in layers}

    assert kinds(small.spec) == kinds(model.spec)
    # Gemma 3n's 15 layers that share keys cannot be fewer
    assert len(small.spec.layers) <= (20 if name.startswith("gemma-3n") else 6)


def test_sizes_that_contradict_one_another_are_left_as_they_are() -> None:
    config = {
        "model_type": "granitemoehybrid",
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 9,
        "layers_block_type": ["mamba"] * 3 + ["attention"] + ["mamba"] * 5,
        "mamba_n_heads": 6,
        "mamba_d_head": 32,
        "vocab_size": 9999,
    }
    model = PlannedModel("granite", ModelSpec.from_config(config), config)
    small = reduced(model)
    assert len(small.spec.layers) == 4
    # the heads of Mamba-2 add up to the hidden size twice
    assert (small.config["hidden_size"], small.config["vocab_size"]) == (96, 512)


def test_rates_are_those_that_the_times_are_made_of() -> None:
    made = KernelRates(
        {"call": 1e-4, "latent call": 3e-4, "folded element": 1e-10}
        | {f"element, group {group}": 1e-10 * group for group in _GROUPS}
        | {f"row, group {group}": 2e-9 for group in _GROUPS}
        | {"latent element, 16 heads": 4e-10, "latent element, 128 heads": 3e-9}
    )
    shapes = _shapes("bfloat16")
    times = [made.seconds(shape.spec, shape.context) for shape in shapes]
    found = KernelRates.fitted(shapes, times)
    for shape, time in zip(shapes, times):
        assert found.seconds(shape.spec, shape.context) == pytest.approx(time, rel=1e-6)
    between = find_model("qwen2.5-7b").spec.layers[0].attention
    assert between is not None
    assert found.seconds(between, 5000) == pytest.approx(made.seconds(between, 5000), rel=1e-6)


def test_times_are_predicted_for_every_kind_of_layer_and_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headwise.planning.kernel_rates._ROUNDS", 4)
    monkeypatch.setattr("headwise.planning.kernel_rates._CACHE_BYTES", 2**20)
    monkeypatch.setattr("headwise.planning.kernel_rates._LONG", 1024)
    monkeypatch.setattr("headwise.planning.decode_times._CONTEXTS", (256, 1024))
    found = plan("gemma-3-1b", bandwidth=1e9, peak=1e9)
    times, _ = check_times(found, lambda stage, done, total: None)
    # at 256 tokens a window of 512 makes no difference
    assert [time.context for time in times] == [256, 1024, 1024]
    assert "window 512" in times[1].attention
    assert "window" not in times[2].attention
    assert all(time.predicted > 0 and 0 < time.low <= time.measured <= time.high for time in times)
    assert check_times(plan("gpt2", device="h100", cache_dtype="int8"), print)[0] == ()


def test_latents_are_predicted_as_latents() -> None:
    spec = find_model("deepseek-v3").spec.layers[0].attention
    assert spec is not None
    rates = KernelRates(
        {"call": 0.0, "element, group 1": 1.0, "row, group 1": 1.0}
        | {"latent call": 1e-4, "folded element": 1e-10}
        | {"latent element, 16 heads": 1e-9, "latent element, 128 heads": 2e-9}
    )
    expected = 1e-4 + 1000 * (2 * 512 + 64) * 2e-9 + 128 * 512 * 256 * 1e-10
    assert rates.seconds(spec, 1000) == pytest.approx(expected)


def test_verify_reports_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    monkeypatch.setattr("headwise.planning.decode_times._CONTEXTS", ())
    found = verify(plan("smollm2-135m", bandwidth=1e9, peak=1e9, memory=2**34))
    assert found.holds and len(found.caches) == 3
    assert found.caches[0].measured == 2 * found.context * found.layers * 768
    assert found.to_dict()["layers"] == found.layers
