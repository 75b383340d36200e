"""The model card: front matter, how to load, and foreign text that stays where it is put."""

import pytest
import yaml
from markdown_it import MarkdownIt

from conversion.verdicts import ENVIRONMENT, verdict
from headwise.conversion.verdict.card import model_card
from headwise.conversion.verdict.quality import Quality

HOSTILE = "a\n```\n# heading\n<b>bold</b> ````\n| cell |\x1b[31m \u202e \ud800"


def split(card: str) -> tuple[dict, list]:
    """Front matter, and the Markdown's tokens."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("gfm-like", {"linkify": False}).parse(text)


def test_front_matter_is_what_hugging_face_reads() -> None:
    front, _ = split(model_card(verdict(base_model="owner/name")))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "tags": ["headwise", "kv-cache", "mqa"],
    }


def test_a_model_that_is_not_from_the_hub_has_no_base() -> None:
    front, _ = split(model_card(verdict(target="mla:50%")))
    assert "base_model" not in front
    assert front["tags"][-1] == "mla"


@pytest.mark.parametrize(("target", "model_type"), [("mqa", "llama"), ("mha", "glm")])
def test_a_stock_architecture_is_loaded_by_transformers_alone(target: str, model_type: str) -> None:
    card = model_card(verdict(target=target, model_type=model_type))
    assert f"ordinary Transformers checkpoint, of model_type `{model_type}`" in card
    assert "import headwise.hf" not in card
    assert "headwise.attach(model)" in card


@pytest.mark.parametrize(
    ("target", "model_type"), [("mla:50%", "headwise_mla"), ("mha", "headwise_deepseek_v3_mha")]
)
def test_our_architecture_is_made_known_first(target: str, model_type: str) -> None:
    card = model_card(verdict(target=target, model_type=model_type))
    assert "headwise.load(folder)" in card
    assert card.index("import headwise.hf") < card.index("AutoModelForCausalLM.from_pretrained")


def test_every_part_of_the_verdict_is_in_the_card() -> None:
    made = verdict(3.4, tuned=Quality(17.6, 0.9, " there was a queen."))
    card = model_card(made)
    for expected in (
        "# `SmolLM2-135M` converted to mqa",
        f"**{made.conclusion}.**",
        "| perplexity | 16.00 | 54.40 | 17.60 |",
        "| 8,192 tokens | 42.1 ms | 23.4 ms | 1.80 (1.70-1.90) |",
        "- converted: 30 x MQA 9/1 heads, D 64 on cpu",
        "| 1 | 0.23 |",
        "Once upon a time",
        " there was a king.",
        " there was was was",
        " there was a queen.",
        made.command,
        "Method aware, 123 seconds",
        "headwise 0.1.0, torch 2.99, transformers 5.24, python 3.11.9",
    ):
        assert expected in card, expected
    _, tokens = split(card)
    assert [token.type for token in tokens].count("table_open") == 3


def test_foreign_text_cannot_leave_its_place_or_control_what_shows_it() -> None:
    plain = model_card(verdict())
    environment = ENVIRONMENT | {"cpu": {"model": HOSTILE, "torch_threads": 2}}
    hostile = model_card(
        verdict(
            model=HOSTILE,
            command=HOSTILE,
            prompt=HOSTILE,
            original=Quality(16.0, 1.0, HOSTILE),
            converted=Quality(24.0, 0.625, HOSTILE),
            environment=environment,
        )
    )
    hostile.encode()
    assert not {"\x1b", "\u202e"} & set(hostile)
    (_, before), (_, after) = split(plain), split(hostile)
    assert [token.type for token in after] == [token.type for token in before]
    inline = [[child.type for child in token.children or []] for token in after]
    assert inline == [[child.type for child in token.children or []] for token in before]


def test_a_base_that_is_no_id_stays_one_value() -> None:
    front, _ = split(model_card(verdict(base_model='a"\nlicense: mit # \\')))
    assert front["base_model"] == 'a"\nlicense: mit # \\'
    assert "license" not in front
