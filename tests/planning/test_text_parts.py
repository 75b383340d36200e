"""The weights of a text part are those that the whole model has beside its other parts."""

from typing import Any

import pytest
import transformers as hf

from families import VOCABULARY
from headwise.planning.model import _model
from headwise.planning.weights import count_weights

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


@pytest.mark.parametrize("tied", [True, False])
def test_a_text_part_that_has_no_head_of_its_own_counts_the_wholes(tied: bool) -> None:
    config = hf.Qwen3VLConfig(
        text_config=dict(_TEXT),
        vision_config={**_VISION, "out_hidden_size": 48, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=tied,
    )
    whole = hf.Qwen3VLForConditionalGeneration(config)
    towers = sum(weight.numel() for weight in whole.model.visual.parameters())
    planned = _model("small", config.to_dict())
    weights = count_weights(planned)
    assert planned.notes == ("the text part alone is counted",)
    assert weights.total == whole.num_parameters() - towers
    assert weights.head == VOCABULARY * 48
    # a step looks one row up, and multiplies with the head
    assert weights.dense == weights.total - (0 if tied else VOCABULARY * 48)


def test_the_experts_of_gemma4_are_counted_as_a_token_takes_them() -> None:
    config = hf.Gemma4TextConfig(
        **_TEXT | {"num_hidden_layers": 1},
        global_head_dim=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=1,
        moe_intermediate_size=5,
        hidden_size_per_layer_input=0,
    )
    (experts,) = count_weights(_model("small", config.to_dict())).experts
    assert (experts.count, experts.chosen, experts.parameters) == (4, 1, 4 * 3 * 48 * 5)


def test_flat_configs_are_planned_as_their_text_part() -> None:
    flat = {"model_type": "qwen2_5_vl", **_TEXT, "vision_config": {"depth": 1}}
    planned = _model("small", flat)
    assert (planned.spec.family, planned.notes) == (
        "qwen2_5_vl_text",
        ("the text part alone is counted",),
    )
    head = VOCABULARY * 48
    assert count_weights(planned).head == head
