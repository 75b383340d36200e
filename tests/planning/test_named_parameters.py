"""The configs in planning/named build models with as many parameters as their makers published.

The published number is the independent answer: no number below was computed from the files.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import headwise

NAMED = Path(headwise.__file__).parent / "planning" / "named"
M, B = 1e6, 1e9


class Published(NamedTuple):
    """A published count, and how far the truth may be from it."""

    number: float
    within: float = 0.0  # 0: exactly this count
    two_tables: bool = False  # it counts a second embedding matrix that the stock class shares


# Where a count is rounded, `within` is half of its last digit, or a whole one where the maker cut
# it off instead. "llama-bench" is what llama.cpp prints of the published checkpoint in GGUF, read
# in public logs of it; "hub" is the count in the checkpoint's safetensors header, read likewise.
PUBLISHED = {
    # README of google-research/bert.
    "bert-base": Published(110 * M, 5 * M),
    "bert-large": Published(340 * M, 5 * M),
    # README of fairseq's examples/roberta.
    "roberta-base": Published(125 * M, 0.5 * M),
    # Wikipedia, T5 (language model), tables of T5 and T5 v1.1: encoder and decoder each with the
    # embeddings. The paper's numbers are 60M, 220M and 11B; t5.1.1.xl.gin says "about 2.8B".
    "t5-small": Published(76_956_160, two_tables=True),
    "t5-base": Published(247_577_856, two_tables=True),
    "t5-11b": Published(11_340_220_416, two_tables=True),
    "flan-t5-xl": Published(2_849_757_184, two_tables=True),
    # README of openai/gpt-2.
    "gpt2": Published(124 * M, 0.5 * M),
    "gpt2-xl": Published(1558 * M, 0.5 * M),
    # arXiv 2204.02311, table 1 (the largest: cut off, or without the norms).
    "palm-8b": Published(8.63 * B, 0.005 * B),
    "palm-62b": Published(62.50 * B, 0.005 * B),
    "palm-540b": Published(540.35 * B, 0.01 * B),
    # Hub: these checkpoints hold the shared matrix twice.
    "falcon-7b": Published(7_217_189_760, two_tables=True),
    "falcon-40b": Published(41_835_970_560, two_tables=True),
    "falcon-180b": Published(179_522_565_120, two_tables=True),
    # Model cards of bigscience/bloom and, as the hub counts it, of bigscience/bloom-7b1.
    "bloom-7b1": Published(7_069_016_064),
    "bloom-176b": Published(176_247_271_424),
    # llama-bench; the model cards say 7B, 13B and 70B.
    "llama-2-7b": Published(6.74 * B, 0.005 * B),
    "llama-2-13b": Published(13.02 * B, 0.005 * B),
    "llama-2-70b": Published(68.98 * B, 0.005 * B),
    # llama-bench; the model card says 8B and 70B.
    "llama-3-8b": Published(8.03 * B, 0.005 * B),
    "llama-3-70b": Published(70.55 * B, 0.005 * B),
    # Meta's model cards of Llama 3.1 and 3.2.
    "llama-3.1-405b": Published(405 * B, 1 * B),
    "llama-3.2-1b": Published(1.23 * B, 0.01 * B),
    "llama-3.2-3b": Published(3.21 * B, 0.005 * B),
    # The name, and a table of measured models with "1.711B".
    "smollm2-135m": Published(135 * M, 0.5 * M),
    "smollm2-1.7b": Published(1.711 * B, 0.0005 * B),
    # llama-bench.
    "mistral-7b-v0.1": Published(7.24 * B, 0.005 * B),
    "mistral-nemo-12b": Published(12.25 * B, 0.005 * B),
    "mixtral-8x7b": Published(46.70 * B, 0.005 * B),
    # Gemma 2 report, table 2, whose table of embeddings has 256128 rows and the hub's 256000.
    "gemma-2-9b": Published(917_962_752 + 8_324_201_984, 128 * 3584),
    "gemma-2-27b": Published(1_180_237_824 + 26_047_480_320, 128 * 4608),
    # llama-bench; the Gemma 3 report, table 1, has 302 + 698, 675 + 3209, 1012 + 10759 and
    # 1416 + 25600 million without the vision encoder.
    "gemma-3-1b": Published(999.89 * M, 0.005 * M),
    "gemma-3-4b": Published(3.88 * B, 0.005 * B),
    "gemma-3-12b": Published(11.77 * B, 0.005 * B),
    "gemma-3-27b": Published(27.01 * B, 0.005 * B),
    # llama-bench, of a GGUF that differs in some small tensors: 1%.
    "gemma-3n-e4b": Published(6.87 * B, 0.0687 * B),
    # The gpt-oss model card (116.8B, 20.9B), more digits from llama-bench.
    "gpt-oss-20b": Published(20.91 * B, 0.005 * B),
    "gpt-oss-120b": Published(116.83 * B, 0.005 * B),
    # Qwen2.5's model card.
    "qwen2.5-7b": Published(7.61 * B, 0.01 * B),
    # llama-bench; the model cards say 0.6B, 8.2B, 32.8B, 30.5B and 80B.
    "qwen3-0.6b": Published(596.05 * M, 0.005 * M),
    "qwen3-8b": Published(8.19 * B, 0.005 * B),
    "qwen3-32b": Published(32.76 * B, 0.005 * B),
    "qwen3-30b-a3b": Published(30.53 * B, 0.005 * B),
    "qwen3-next-80b-a3b": Published(79.67 * B, 0.005 * B),
    # DeepSeek-V2's report, appendix B.1 and section 3.1.2.
    "deepseek-v2-lite": Published(15.7 * B, 0.05 * B),
    "deepseek-v2": Published(236 * B, 0.5 * B),
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: the main model without its MTP module.
    "deepseek-v3": Published(671 * B, 0.5 * B),
    # The same model and the indexers of its 61 layers, whose size no one states: 1B more at most.
    "deepseek-v3.2": Published(671.5 * B, 0.5 * B),
    # llama-bench; Transformers' page says 30B.
    "glm-4.7-flash": Published(29.94 * B, 0.005 * B),
    # README of OpenBMB/MiniCPM: "4 billion parameters".
    "minicpm3-4b": Published(4 * B, 0.5 * B),
    # arXiv 2305.06161, abstract.
    "starcoder": Published(15.5 * B, 0.05 * B),
}

AUTO = {"bert": AutoModel, "roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


def read(name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((NAMED / f"{name}.json").read_text())
    return entry


def parameters(config: dict[str, Any]) -> int:
    """The parameters of the stock class for a config, shared ones once."""
    kind = config.pop("model_type")
    built = AutoConfig.for_model(kind, **config)
    with torch.device("meta"):
        model = AUTO.get(kind, AutoModelForCausalLM).from_config(built)
    return sum(parameter.numel() for parameter in model.parameters())


def palm_parameters(config: dict[str, Any]) -> int:
    """What section 2 of the PaLM paper describes; Transformers has no such class."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * width * queries + 2 * width * keys + 3 * width * inner + width
    table = config["vocab_size"] * width
    return int(config["num_hidden_layers"] * layer + table + width)


def test_every_named_config_is_checked_here() -> None:
    assert {path.stem for path in NAMED.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_entry_names_its_sources(name: str) -> None:
    entry = read(name)
    assert list(entry) == ["title", "sources", "config"]
    assert entry["title"]
    assert entry["sources"]
    assert all(source.startswith(("https://", "Transformers ")) for source in entry["sources"])
    assert next(iter(entry["config"])) == "model_type"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    config, published = read(name)["config"], PUBLISHED[name]
    expected = published.number
    if published.two_tables:
        width = config.get("d_model") or config["hidden_size"]
        expected -= config["vocab_size"] * width
    count = palm_parameters(config) if config["model_type"] == "palm" else parameters(config)
    assert abs(count - expected) <= published.within, f"{count:,} parameters"
