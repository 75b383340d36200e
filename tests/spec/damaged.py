"""Configs of every family with one to three fields damaged, dropped, or of another family."""

import random
from collections.abc import Iterator
from typing import Any

from headwise.spec.families import FAMILIES
from spec.stock import CONFIGS, raw_config

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 10**9, 10**18, 10**400, -0.5, 1.5),
    *(float("nan"), float("inf"), "", "x", "7", "one\nand two\n" * 99),
    *([], [1], ["x"], [["x"]], [["full_attention"]] * 7, {}, {"a": 1}, {"rope_type": [1]}),
    *(["full_attention"], ["linear_attention"] * 3, ["linear_attention"] * 7),
    ["sliding_attention"] * 7,
)
# Fields that some families have and others look at by mistake.
_OTHERS = (
    *("model_type", "text_config", "architectures", "layer_types", "per_layer_config", "is_causal"),
    *("rope_scaling", "rope_parameters", "sliding_window", "head_dim", "num_key_value_heads"),
    *("use_bidirectional_attention", "vocab_size", "intermediate_size", "num_experts_per_tok"),
    *("pad_token_id", "dtype", "quantization_config", "hidden_act"),
)
_OUTER = ("llava", "paligemma", "gemma3", 7, None)


def damaged(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` configs, the same at every call with that seed."""
    draw = random.Random(seed)
    for _ in range(count):
        config = raw_config(draw.choice(list(CONFIGS)))
        if draw.random() < 0.3:
            config = {**FAMILIES[config["model_type"]].defaults, **config}
        how = draw.random()
        if how < 0.15:
            config["model_type"] = draw.choice(list(FAMILIES))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            name = draw.choice([*config, *_OTHERS])
            if how > 0.85:
                config.pop(name, None)
            else:
                config[name] = draw.choice(VALUES)
        if draw.random() < 0.1:
            config = {"model_type": draw.choice(_OUTER), "text_config": config}
        yield config
