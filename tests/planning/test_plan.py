"""A plan: its bounds, what fits, the other mechanisms; and models that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

import headwise
from headwise import LoadError, OptionError, SpecError
from headwise.planning import DEVICES, named_model, named_models, plan
from headwise.planning.devices import find_device
from headwise.planning.model import find_model
from headwise.planning.named_models import near_names

GIB = 2**30
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOKEN = 3 * 2 * (32 + 32) * 2  # layers, kv heads, key and value, bytes
# attention: q and o of 256 x 256, k and v of 256 x 64; the MLP's three; two norms a layer, and one
LAYER = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 512 + 2 * 256
PARAMETERS = 3 * LAYER + 1000 * 256 + 256


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def planned(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"bandwidth": 1e9, "peak": 1e12, "memory": 2 * PARAMETERS + 10**7}
    return plan(write(folder, LLAMA), **(given | options))


def test_a_decode_step_reads_the_weights_once_and_each_cache(tmp_path: Path) -> None:
    found = planned(tmp_path, context=1000, batch=3)
    assert found.weights.total == found.weights.dense == PARAMETERS  # the embedding is the head too
    cost = found.decode.cost
    assert cost.weight_bytes == 2 * PARAMETERS
    assert cost.cache_bytes == 3 * 1000 * TOKEN
    attended = 3 * 3 * 2 * 8 * 1000 * (32 + 32)
    assert cost.flops == 3 * 2 * PARAMETERS + attended
    assert found.decode.seconds == pytest.approx(cost.bytes / 1e9)
    assert found.decode.tokens_per_second == pytest.approx(3 / found.decode.seconds)
    assert found.decode.bound == "bandwidth"


def test_a_prefill_attends_to_half_of_the_square(tmp_path: Path) -> None:
    found = planned(tmp_path, context=1000, batch=2, peak=1e9)
    pairs = 1000 * 1001 // 2
    expected = 2 * (2 * 1000 * PARAMETERS + 3 * 2 * 8 * pairs * (32 + 32))
    assert found.prefill.cost.flops == expected
    assert found.prefill.bound == "compute"
    assert found.prefill.seconds == pytest.approx(expected / 1e9)


def test_what_fits_is_the_most_that_fits(tmp_path: Path) -> None:
    found = planned(tmp_path, context=1000, batch=2)
    assert found.largest_context == 4096 and found.at_limit
    assert found.largest_batch == 10**7 // (1000 * TOKEN)
    found = planned(tmp_path, context=1000, batch=5)
    assert found.largest_context == 10**7 // (5 * TOKEN) and not found.at_limit
    nothing = planned(tmp_path, memory=PARAMETERS)
    assert (nothing.largest_context, nothing.largest_batch) == (0, 0)


def test_the_window_of_a_model_lets_any_context_fit() -> None:
    # 4095 tokens take 512 MiB, and so do more
    found = plan("mistral-7b-v0.1", device="h100", batch=8)
    assert found.at_limit and found.cached.needed == 8 * 4095 * 128 * 1024


def test_the_other_mechanisms_keep_heads_and_change_the_cache() -> None:
    found = plan("llama-3-8b", device="h100", context=4096)
    assert [other.name for other in found.alternatives] == ["MHA", "GQA-8 (as it is)", "MQA", "MLA"]
    rows = [other.bytes_per_token for other in found.alternatives]
    # 32 layers; an MLA of R = 4 x 128 and P = 64
    assert rows == [32 * 32 * 512, 32 * 8 * 512, 32 * 512, 32 * (512 + 64) * 2]
    times = [other.decode.tokens_per_second for other in found.alternatives]
    assert times[0] < times[1] < times[3] < times[2]
    names = [other.name for other in plan("smollm2-135m", device="h100").alternatives]
    assert names == ["MHA", "GQA-3 (as it is)", "MQA", "MLA"]
    names = [other.name for other in plan("deepseek-v3", device="h100").alternatives]
    assert names == ["MHA", "GQA-8", "MQA", "MLA (as it is)"]
    assert plan("qwen3-0.6b", device="h100").alternatives[0].name == "MHA"


def test_experts_are_read_as_they_are_expected_to_be_chosen() -> None:
    one, many = (plan("mixtral-8x7b", device="h100", context=64, batch=at) for at in (1, 1000))
    # arXiv 2401.04088: 13B active of 47B
    assert one.decode.cost.weight_bytes == pytest.approx(2 * 12.75e9, rel=0.01)
    assert many.decode.cost.weight_bytes == pytest.approx(2 * one.weights.total, rel=0.01)


def test_a_config_file_a_folder_and_a_dtype_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA | {"torch_dtype": "float32"})
    by_folder = plan(folder, device="h100")
    by_file = plan(str(tmp_path / "config.json"), device="h100")
    assert by_folder.dtype == by_file.dtype == "float32"
    assert by_folder.model.name == by_file.model.name == tmp_path.name
    assert by_folder.bytes_per_token == 2 * TOKEN
    assert plan(folder, device="h100", dtype="fp16").bytes_per_token == TOKEN


def test_a_context_beyond_the_models_limit_is_answered_and_noted(tmp_path: Path) -> None:
    found = planned(tmp_path, context=8192, memory=GIB)
    assert found.largest_context == 8192 and not found.at_limit
    assert "8,192 tokens are more than the 4,096 that the model takes" in found.notes


def test_a_multimodal_config_counts_its_text_part(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": LLAMA, "vision_config": {}}
    found = plan(write(tmp_path, config), device="h100")
    assert found.weights.total == PARAMETERS
    assert "the text part alone is counted" in found.notes


def test_quantised_checkpoints_are_noted(tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}
    assert "stored as mxfp4" in " ".join(plan(write(tmp_path, config), device="h100").notes)


def test_the_plan_is_plain_data() -> None:
    found = plan("gemma-3-1b", device="h100", context=2048)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["cached"]["needed"] == found.cached.needed
    assert fields["model"]["sources"] and fields["groups"][0]["mechanism"] == "MQA"
    assert str(found).startswith("Gemma 3 1B")


def test_headwise_plan_is_the_function() -> None:
    assert headwise.plan is plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"context": -1}, "context is -1"),
        ({"context": True}, "context is True"),
        ({"encoder_context": 5}, "no cross-attention"),
        ({"cache_dtype": "int2"}, "cache_dtype is 'int2'"),
        ({"device": "h10"}, "did you mean h100 or h200"),
        ({"bandwidth": 0}, "bandwidth is 0"),
        ({"memory": -5}, "memory is -5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan("gpt2", **({"device": "h100"} | options))
    with pytest.raises(SpecError, match="dtype='int3'"):
        plan("gpt2", device="h100", dtype="int3")


def test_a_typo_suggests_the_names_that_are_near() -> None:
    with pytest.raises(LoadError, match="did you mean llama-3-8b"):
        plan("lama3-8b")
    assert near_names("google/gemma3-27b")[0] == "gemma-3-27b"
    with pytest.raises(LoadError, match="no model 'zzz'") as raised:
        plan("zzz")
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a readable JSON"), ("[1]", "holds a list"), (None, "has no config.json")],
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadError, match=message):
        plan(str(tmp_path))


def test_a_config_that_transformers_refuses_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Transformers does not take this config"):
        plan(write(tmp_path, LLAMA | {"vocab_size": "many"}), device="h100")
    with pytest.raises(SpecError, match="num_key_value_heads=3"):
        plan(write(tmp_path, LLAMA | {"num_key_value_heads": 3}), device="h100")


def test_every_named_model_has_sources_and_a_spec() -> None:
    assert len(named_models()) >= 30
    for name in named_models():
        known = named_model(name)
        assert known.title and known.sources
        assert all(len(source) > 20 for source in known.sources)
        assert find_model(name).spec.family == known.config["model_type"]


def test_figures_that_are_given_hold_instead_of_the_devices() -> None:
    device = find_device("h100", "bfloat16", peak=5e12, memory=7)
    assert device.peak("bfloat16") == 5e12 and device.memory == 7
    assert device.bytes_per_second == DEVICES["h100"].bytes_per_second
    assert device.seconds(3.35e12, 1e12, "bfloat16") == pytest.approx(1.0)
    assert device.seconds(3.35e9, 1e13, "bfloat16") == pytest.approx(2.0)
