"""A plan: its bounds, what fits, the other mechanisms; and models that are none."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

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


def test_ranks_hold_their_blocks_and_pay_where_attention_gains_more(tmp_path: Path) -> None:
    found = planned(tmp_path, context=1000, batch=3, ranks=4, link=1e9).ranks
    assert found.cache_bytes == 3 * 256 * TOKEN  # four blocks of 64, of sixteen
    step = 3 * (3 * 8 * (32 * 2 + 4) + 1000 * 2) + 32
    assert found.sent_bytes == 3 * step
    assert found.seconds == pytest.approx(1e-3 + 3 * step / 1e9)

    def gained(context: int) -> float:
        most = context // 256 * 64 + min(context % 256, 64)
        return 3 * TOKEN * (context - most) / 1e9

    assert gained(found.pays_from - 1) < found.seconds <= gained(found.pays_from)
    shown = re.sub(r"[\s│]+", " ", str(planned(tmp_path, context=1000, ranks=2)))
    assert "over 2 ranks (estimate)" in shown
    assert planned(tmp_path, context=1000).ranks is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 1}, "ranks is 1, expected an int from 2 on"),
        ({"ranks": True}, "ranks is True"),
        ({"ranks": 2, "link": -1.0}, "link is -1.0"),
        ({"link": "2GB/s"}, "give their number"),
    ],
)
def test_ranks_that_are_none_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        planned(tmp_path, context=1000, **options)


def test_a_step_that_chooses_reads_the_sketch_and_what_it_chose(tmp_path: Path) -> None:
    asked = "topk:100,sinks=4,recent=16,dense=1"
    found = planned(tmp_path, context=1000, batch=3, sparse=asked)
    layer, sketch = TOKEN // 3, 2 * (16 + 4)  # 2 kv heads of 32: 4 bits, and a scale of float32
    one = 1000 * layer + 2 * (1000 * sketch + 100 * layer)
    assert found.decode.cost.cache_bytes == 3 * one
    scores = 8 * 32 * 1000
    attended = 2 * (8 * 1000 * 64 + 2 * (scores + 8 * 100 * 64))
    assert found.decode.cost.flops == 3 * (2 * PARAMETERS + attended)
    assert found.largest_batch == 10**7 // (1000 * (TOKEN + 2 * sketch))
    shown = re.sub(r"[\s│]+", " ", str(found))
    assert "topk:100,sinks=4,recent=16,dense=1: 2 layers, by 40 bytes per token" in shown
    assert found.to_dict()["sparse"] == asked
    # an int4 cache is its own sketch: 16 bytes and a scale, twice
    found = planned(tmp_path, context=1000, sparse=asked, cache_dtype="int4")
    assert found.decode.cost.cache_bytes == 1000 * 80 + 2 * (1000 * 40 + 100 * 80)
    assert found.largest_batch == 10**7 // (1000 * 3 * 80)
    below = planned(tmp_path, context=100, sparse=asked)
    assert below.decode.cost == planned(tmp_path, context=100).decode.cost
    assert "a step sees all of 100 tokens" in re.sub(r"[\s│]+", " ", str(below))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("topk:100,dense=3", "no layer of .* can choose its keys: one of the first 3 layers"),
        ("top:100", "sparse is 'top:100', expected"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(tmp_path: Path, asked: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        planned(tmp_path, context=1000, sparse=asked)


def test_a_prefill_attends_to_half_of_the_square(tmp_path: Path) -> None:
    found = planned(tmp_path, context=1000, batch=2, peak=1e9)
    pairs = 1000 * 1001 // 2
    head = 1000 * 256  # for the logits of the last token only
    weights = 1000 * (PARAMETERS - head) + head
    expected = 2 * (2 * weights + 3 * 2 * 8 * pairs * (32 + 32))
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
    assert [other.name for other in found.alternatives] == ["mha", "gqa:8 (as it is)", "mqa", "mla"]
    rows = [other.bytes_per_token for other in found.alternatives]
    # 32 layers; an MLA of R = 4 x 128 and P = 64
    assert rows == [32 * 32 * 512, 32 * 8 * 512, 32 * 512, 32 * (512 + 64) * 2]
    times = [other.decode.tokens_per_second for other in found.alternatives]
    assert times[0] < times[1] < times[3] < times[2]
    names = [other.name for other in plan("smollm2-135m", device="h100").alternatives]
    assert names == ["mha", "gqa:3 (as it is)", "mqa", "mla"]
    names = [other.name for other in plan("deepseek-v3", device="h100").alternatives]
    assert names == ["mha", "gqa:8", "mqa", "mla (as it is)"]
    assert plan("qwen3-0.6b", device="h100").alternatives[0].name == "mha"


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
        ({"cache_dtype": "float32"}, "no cache has another"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"dtype": ""}, "dtype is ''"),
        ({"dtype": "float8_e4m3fn"}, "expected bfloat16, float16 or float32"),
        ({"device": "h10"}, "did you mean h100 or h200"),
        ({"bandwidth": 0}, "bandwidth is 0"),
        ({"memory": -5}, "memory is -5"),
        ({"memory": "24"}, "memory is '24', expected a size"),
        ({"memory": True}, "memory is True"),
        ({"memory": 1.5}, "memory is 1.5"),
        ({"peak": float("inf")}, "peak is inf"),
        ({"context": 2**40, "batch": 2**40}, "more bytes than can be counted"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan("gpt2", **({"device": "h100"} | options))


def test_what_is_no_name_is_refused() -> None:
    for wrong in (None, 5, b"gpt2"):
        with pytest.raises(OptionError, match="expected a name or a path"):
            plan(wrong)  # type: ignore[arg-type]
    for name in ("x" * 5000, "~nosuchuser/x", "a\0b", ""):
        with pytest.raises(LoadError, match="no model"):
            plan(name)


# the decoder's k and v of the encoder's tokens: 768 x 768 each, in 12 layers
def test_an_encoders_keys_are_made_once() -> None:
    found = plan("t5-base", device="h100", context=50, encoder_context=700)
    assert found.weights.cross == 12 * 2 * 768 * 768
    assert found.weights.head == 32128 * 768
    # self-attention 4, cross-attention's q and o, an MLP of 2 x 768 x 3072, 3 norms; one at the end
    decoder = 12 * (6 * 768 * 768 + 2 * 768 * 3072 + 3 * 768) + 768 + 12 * 32 + 32128 * 768
    assert found.weights.dense == pytest.approx(decoder, rel=1e-4)
    prompt = decoder - 32128 * 768 + 32128 * 768
    encoder = 700 * (found.weights.encoder + found.weights.cross)
    attended = 12 * (2 * 12 * 700 * 700 * 128) + 12 * (2 * 12 * 1 * 128) + 12 * (2 * 12 * 700 * 128)
    assert found.prefill.cost.flops == pytest.approx(2 * (prompt + encoder) + attended, rel=1e-4)


def test_t5_v11_has_a_head_of_its_own() -> None:
    # the number that its hub page shows
    assert plan("flan-t5-xl", device="h100").weights.total == 2_849_757_184


def test_mechanisms_that_come_to_the_same_are_listed_once() -> None:
    names = [other.name for other in plan("t5-small", device="h100").alternatives]
    assert names == ["mha (as it is)", "mqa", "mla"]
    names = [other.name for other in plan("gemma-3-1b", device="h100").alternatives]
    assert names == ["mha", "mqa (as it is)", "mla"]


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 1000},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "nonsense"},
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": "float8_e4m3fn"},
        {"quantization_config": "odd"},
    ],
)
def test_what_a_config_says_beside_its_shapes_is_no_obstacle(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    found = plan(write(tmp_path, LLAMA | changes), device="h100")
    assert (found.weights.total, found.dtype) == (PARAMETERS, "bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "odd"},
        {"rope_scaling": {"type": "odd"}},
        {"vocab_size": -1},
        {"vocab_size": 2**62},
        {"intermediate_size": -5},
        {"hidden_size": 10**400},
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as raised:
        plan(write(tmp_path, LLAMA | {"head_dim": 32} | changes), device="h100")
    assert "\n" not in str(raised.value)


def test_more_experts_than_there_are_is_refused(tmp_path: Path) -> None:
    config = {**named_model("mixtral-8x7b").config, "num_experts_per_tok": 16}
    with pytest.raises(SpecError, match="num_experts_per_tok=16"):
        plan(write(tmp_path, config), device="h100")


def test_other_families_with_holes_are_refused_in_one_line(tmp_path: Path) -> None:
    palm = {**named_model("palm-8b").config, "intermediate_size": "x"}
    with pytest.raises(SpecError, match="intermediate_size"):
        plan(write(tmp_path, palm), device="h100")
    falcon = {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 71}
    assert plan(write(tmp_path, falcon), device="h100").cached.stock is not None


def test_outer_fields_of_a_multimodal_config_count(tmp_path: Path) -> None:
    outer = {"torch_dtype": "float32", "quantization_config": {"quant_method": "gptq"}}
    config = {"model_type": "llava", "text_config": LLAMA, **outer}
    found = plan(write(tmp_path, config), device="h100")
    assert found.dtype == "float32" and "stored as gptq" in " ".join(found.notes)


def test_a_model_without_a_limit_says_what_it_was_planned_for() -> None:
    assert any("sets no limit" in note for note in plan("bloom-7b1", device="h100").notes)
    notes = plan("bloom-7b1", device="h100", context=2048).notes
    assert not any("sets no limit" in note for note in notes)


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


def test_infinities_are_read_as_transformers_writes_them(tmp_path) -> None:
    transformers.Mamba2Config(num_hidden_layers=2).save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert "state-space duality" in str(plan(str(tmp_path), context=64, device="h100"))


def test_states_have_a_line_with_the_context_from_which_attention_caches_more() -> None:
    printed = str(plan("qwen3-next-80b-a3b", context=4096, device="h100"))
    shown = " ".join(printed.replace("│", " ").split())
    # 32 heads of 128 x 128 in float32, and 4 inputs of 8,192 channels in bfloat16
    held = 32 * 128 * 128 * 4 + 4 * 8192 * 2
    assert f"36 layers, {held:,} bytes per sequence and layer at any context" in shown
    # 2 kv heads of 256, keys and values, in bfloat16
    first = held // (2 * 2 * 256 * 2) + 1
    assert f"a layer of attention caches more from {first:,} tokens on" in shown
    assert "states" not in str(plan("llama-3-8b", context=4096, device="h100"))


def test_the_keys_of_indexers_have_a_line() -> None:
    said = " ".join(str(plan("deepseek-v3.2", context=32768, device="h100")).split())
    # 128 numbers of 2 bytes; a layer's step reads all of them, and 2,048 of its rows of 576
    assert "61 layers, 256 bytes of keys per token and layer" in said
    assert "reads 8 MiB" in said
    assert 32768 * 256 == 8 * 2**20
    shared = {"model_type": "glm_moe_dsa", "indexer_types": ["full"] + 77 * ["shared"]}
    spec = headwise.ModelSpec.from_config(shared)
    assert spec.cache_bytes_per_token("bf16") == 2 * (78 * 576 + 128)
    with pytest.raises(SpecError, match="no layer chooses before the first one"):
        headwise.ModelSpec.from_config(shared | {"indexer_types": 78 * ["shared"]})
    with pytest.raises(SpecError, match="expected 78 of 'full' and 'shared'"):
        headwise.ModelSpec.from_config(shared | {"indexer_types": ["full"]})
