"""Verdicts made by hand."""

from dataclasses import replace
from typing import Any

from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.speed import DecodeSpeed, Speeds
from headwise.conversion.verdict.verdict import CacheCost, Verdict
from headwise.measure.timing import Ratio

ENVIRONMENT = {
    "headwise": "0.1.0",
    "torch": "2.99",
    "transformers": "5.24",
    "python": "3.11.9",
    "cpu": {"model": "Some CPU @ 2.0 GHz", "torch_threads": 2},
}
SPEEDS = Speeds(
    contexts=(
        DecodeSpeed(512, 0.0211, 0.0199, Ratio(1.06, 1.01, 1.11)),
        DecodeSpeed(8192, 0.0421, 0.0234, Ratio(1.8, 1.7, 1.9)),
    ),
    original="30 x GQA 9/3 heads, D 64 on cpu",
    converted="30 x MQA 9/1 heads, D 64 on cpu",
)


def verdict(factor: float = 1.5, **changes: Any) -> Verdict:
    """A conversion to MQA that multiplies a perplexity of 16."""
    made = Verdict(
        model="SmolLM2-135M",
        model_type="llama",
        target="mqa",
        method="aware",
        cache=CacheCost(original=23040, converted=7680, dtype="bfloat16"),
        speeds=SPEEDS,
        command="headwise convert --to mqa --calibration text.txt --out small",
        seconds=123.4,
        prompt="Once upon a time",
        positions=8176,
        original=Quality(16.0, 1.0, " there was a king."),
        converted=Quality(16.0 * factor, 0.625, " there was was was"),
        layer_errors=(0.011, 0.23, 0.049),
        environment=ENVIRONMENT,
    )
    return replace(made, **changes)
