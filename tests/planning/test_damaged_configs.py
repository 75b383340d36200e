"""A plan of a damaged config, or for absurd numbers, is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from headwise import HeadwiseError, LoadError, OptionError, SpecError
from headwise.planning import plan
from spec.damaged import damaged

_TWO: dict[str, Any] = {"num_hidden_layers": 2}


def planned(folder: Path, config: Any, **options: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return plan(folder, device="h100", **options)


def test_every_damaged_config_is_planned_or_refused_in_one_line(tmp_path: Path) -> None:
    done, refused = 0, []
    for config in damaged(seed=23, count=60):
        try:
            found = planned(tmp_path, config, context=64)
        except HeadwiseError as error:
            refused.append(str(error))
            continue
        json.dumps(found.to_dict())
        done += 1
    assert done > 5 and len(refused) > 5
    assert [line for line in refused if "\n" in line or len(line) >= 700] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            hf.Phi3Config(**_TWO).to_dict()
            | {"layer_types": ["linear_attention", "full_attention"]},
            "layer 0 caches keys and values, and Transformers makes a LinearAttentionLayer",
        ),
        (
            hf.Qwen3Config(**_TWO).to_dict() | {"model_type": "deepseek_v32"},
            "layer 0 caches an indexer's keys, and Transformers makes a DynamicLayer",
        ),
        (
            {"model_type": "bloom", "sliding_window": [1]},
            "Transformers does not take this config",
        ),
        ({"model_type": "llama", "max_position_embeddings": 2**50}, "give a context"),
    ],
)
def test_a_config_that_contradicts_itself(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((SpecError, OptionError), match=message) as caught:
        planned(tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1, 2]", '"x"', "7", "null", "{", "[" * 10**5, ""])
def test_a_file_that_is_no_config(content: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(LoadError) as caught:
        plan(file, device="h100")
    assert "\n" not in str(caught.value)


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="model_type='mamba' is not covered"):
        planned(tmp_path, {"model_type": "mamba"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("context", value) for value in (0, -1, 10**30, 10**6000, "8q", 1.5, True, [1])),
        *(("batch", value) for value in (0, 10**30, None, "x")),
        *(("dtype", value) for value in ("int9", 7, [1], "x" * 5000)),
        *(("cache_dtype", value) for value in ("int9", 7, [1])),
        *(("device", value) for value in ("h10", 7, [1], "")),
        *(("memory", value) for value in (0, -1, 1.5, "24", float("nan"), 10**400)),
        *(("bandwidth", value) for value in (0, float("inf"), [1])),
        ("encoder_context", 5),
    ],
    # an int of 6,000 digits has no str
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_an_absurd_option_is_named(option: str, value: Any) -> None:
    given: dict[str, Any] = {"device": "h100", "context": 64, option: value}
    with pytest.raises(OptionError, match=option) as caught:
        plan("gpt2", **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_encoder_of_an_encoder_decoder_alone_is_planned(tmp_path: Path) -> None:
    found = planned(tmp_path, {"model_type": "t5", "is_encoder_decoder": False})
    assert (found.bytes_per_token, found.decode) == (0, None)
    model = hf.T5EncoderModel(hf.T5Config())
    assert found.weights.total == sum(each.numel() for each in model.parameters())
