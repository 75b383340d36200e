"""The table of docs/models.md, made from the models that the tests attach to.

python tests/make_family_table.py > docs/models.md
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import headwise
from families import ENCODERS, FAMILIES, LINEAR, OWN_FORWARD, make
from hf.test_attach_generation import MODES, modes_without
from hf.test_attach_partly import PARTLY

_TITLES = {
    "llama-gqa": "Llama 2 70B, Llama 3, SmolLM2",
    "llama-mha": "Llama 2 7B and 13B",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE",
    "mixtral": "Mixtral",
    "phi3": "Phi-3, Phi-4",
    "glm": "GLM-4 9B",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "gpt_oss": "gpt-oss",
    "gpt2": "GPT-2",
    "gpt_bigcode": "GPT-BigCode, StarCoder",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1",
    "deepseek_v3-yarn": "the same with YaRN",
    "deepseek_v2-mha": "DeepSeek-V2 expanded to MHA",
    "deepseek_v3-mha": "DeepSeek-V3 expanded to MHA",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "minicpm3": "MiniCPM3",
    "axk1": "A.X K1",
    "youtu": "Youtu-LLM",
    "mistral4": "Mistral Small 4",
    "longcat_flash": "LongCat-Flash",
    "kimi_linear": "Kimi Linear",
    "bailing_hybrid": "Ling 3",
    "headwise_mla": "Llama, Mistral and Qwen2 converted to MLA",
    "falcon-7b": "Falcon 7B",
    "falcon-40b": "Falcon 40B and 180B",
    "falcon-rw": "Falcon RW",
    "bloom": "Bloom",
    "t5": "T5, FLAN-T5",
    "bert": "BERT",
    "roberta": "RoBERTa",
}
_HEAD = """# Models

Every family here is attached in the tests as a small random model and compared with stock
Transformers: greedy tokens, and logits within the dtype's tolerance ([what equal
means](concepts/equality.md)). This page is made from those tests
(`python tests/make_family_table.py`).

| models | attention | cache | decode | prefill | on headwise by |
|---|---|---|---|---|---|"""


def main() -> None:
    """Print the page."""
    print(_HEAD)
    for family in FAMILIES:
        print("| " + " | ".join(_row(family)) + " |")
    print("\nGeneration is tested in these modes:\n")
    for mode in MODES:
        without = sorted(_TITLES[family] for family in modes_without(mode))
        print(f"- {mode}" + (f"; not {', '.join(without)}, where stock refuses" if without else ""))
    encoders = ", ".join(_TITLES[family] for family in ENCODERS)
    print(f"\n{encoders}: hidden states, with padding. All: training, saving, copying, pickling.")
    print("\nOf these models a part stays with Transformers, and the report names it:\n")
    for title, reason in PARTLY.items():
        print(f"- {title}: {reason}")
    print(
        "\nOther families that run on SDPA in stock are attached too, without a spec: what each "
        "call needs\nis read from its arguments. [Add one](extending/family.md)."
    )


def _row(family: str) -> list[str]:
    model = make(family)
    report = headwise.attach(model, strict=family not in LINEAR)
    attached = [layer for layer in report.layers if not layer.stock]
    by = "its modules' forward" if family in OWN_FORWARD else "the attention interface"
    kinds = dict.fromkeys(_kind(layer.spec) for layer in attached)
    if family in LINEAR:
        kinds["linear attention, by stock"] = None
    chosen = [
        ", ".join(
            dict.fromkeys(headwise.ops.Explanation(getattr(at, phase)).chosen for at in attached)
        )
        for phase in ("decode", "prefill")
    ]
    return [_TITLES[family], "; ".join(kinds), report.cache, *chosen, by]


def _kind(spec: Any) -> str:
    labels = {
        "cross-attention": spec.cross,
        "bidirectional": not spec.causal and not spec.cross,
        "window": spec.window is not None,
        "softcap": spec.softcap is not None,
        "sinks": spec.sinks,
        "ALiBi": spec.alibi,
        "relative bias": spec.relative_bias,
        "QK-norm": spec.qk_norm,
        "compressed queries": spec.query_rank is not None,
    }
    return " ".join([spec.mechanism, *(label for label, present in labels.items() if present)])


if __name__ == "__main__":
    main()
