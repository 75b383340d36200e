"""The verdict: bytes by hand, its conclusion, and its way through JSON."""

import json

import pytest
import torch
from transformers import LlamaConfig

from conversion.verdicts import verdict
from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.speed import Speeds
from headwise.conversion.verdict.tables import notes, quality_rows, speed_rows
from headwise.conversion.verdict.verdict import CacheCost, Verdict


def llama(kv_heads: int, dtype: torch.dtype | None) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        hidden_size=132,
        head_dim=22,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("dtype", "name", "size"), [(torch.float16, "float16", 2), (None, "float32", 4)]
)
def test_cache_bytes_are_those_of_keys_and_values_in_the_checkpoints_dtype(
    dtype, name: str, size: int
) -> None:
    cost = CacheCost.between(llama(3, dtype), llama(1, dtype))
    assert cost == CacheCost(7 * 3 * 2 * 22 * size, 7 * 1 * 2 * 22 * size, name)
    assert cost.share == pytest.approx(1 / 3)


def test_a_verdict_is_the_same_after_json() -> None:
    for made in (
        verdict(tuned=Quality(17.0, 0.9, " there was a queen.")),
        verdict(original=None, converted=None, layer_errors=(), speeds=Speeds(note="none")),
    ):
        assert Verdict.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_json_holds_the_conclusion() -> None:
    assert verdict().to_dict()["conclusion"] == verdict().conclusion


def test_a_conclusion_says_what_is_kept_and_lost() -> None:
    assert verdict(1.5).conclusion == (
        "mqa keeps 33% of the cache, multiplies perplexity by 1.50 and agrees with the original "
        "on 62.5% of likeliest tokens"
    )


def test_a_cache_that_grew_is_said_to_have_grown() -> None:
    grown = verdict(1.0, target="mha", cache=CacheCost(7680, 23040, "bfloat16"))
    assert grown.conclusion.startswith("mha takes 3.0 times the cache, multiplies perplexity by 1")


def test_a_conversion_that_more_than_doubles_perplexity_is_called_unusable() -> None:
    assert verdict(3.4).conclusion == (
        "mqa multiplies perplexity by 3.4: not usable as it is; tune it (--tune) or keep more of "
        "the cache"
    )
    assert "not usable" not in verdict(2.0).conclusion


def test_tuning_is_what_counts_where_there_was_any() -> None:
    better = verdict(3.4, tuned=Quality(17.6, 0.9, ""))
    assert "multiplies perplexity by 1.10 and agrees with the original on 90.0%" in (
        better.conclusion
    )
    worse = verdict(9.0, tuned=Quality(40.0, 0.4, ""))
    assert "by 2.5: not usable as it is; tune it longer (--tune) or keep" in worse.conclusion


def test_without_a_text_the_conclusion_says_that_quality_was_not_measured() -> None:
    made = verdict(target="mla", original=None, converted=None)
    assert "quality was not measured, but nothing is dropped" in made.conclusion


def test_figures_stand_in_a_column_for_each_model() -> None:
    rows = quality_rows(verdict(1.5, tuned=Quality(17.6, 0.9, "")))
    assert rows == [
        ["", "original", "converted", "tuned"],
        ["cache bytes per token", "23,040", "7,680", "7,680"],
        ["perplexity", "16.00", "24.00", "17.60"],
        ["  times the original's", "1.00", "1.50", "1.10"],
        ["original's likeliest token", "100.0%", "62.5%", "90.0%"],
    ]
    assert speed_rows(verdict())[2] == [
        "8,192 tokens",
        "42.1 ms",
        "23.4 ms",
        "1.80 (1.70-1.90)",
    ]


def test_what_was_not_measured_has_no_rows_and_a_note() -> None:
    made = verdict(original=None, converted=None, positions=0, speeds=Speeds(note="why not"))
    assert [row[0] for row in quality_rows(made)] == ["", "cache bytes per token"]
    assert len(speed_rows(made)) == 1
    assert notes(made) == ["cache in bfloat16", "why not"]
