"""NaN in a model, names that hold control characters, and arguments of another type."""

import json
import math
import warnings
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from headwise.errors import HeadwiseError
from headwise.viewing import view
from viewing.words import Words

WORDS = Words("the", "cat", "sat", "on", "a", "mat")
TEXT = "the cat sat on a mat"


def broken(where: str) -> Any:
    model = families.make("llama-gqa")
    parts = {"logits": model.lm_head, "weights": model.model.layers[1].self_attn.q_proj}
    torch.nn.init.constant_(parts[where].weight, math.nan)
    return model


def in_page(folder: Path) -> dict[str, Any]:
    text = (folder / "v.html").read_text()
    start = text.index('"model":') - 1
    return dict(json.JSONDecoder(parse_constant=pytest.fail).raw_decode(text[start:])[0])


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_logits_that_are_nan_are_null_in_page_and_numbers(where: str, tmp_path: Path) -> None:
    # rows of some tokens alone: then the page has pooled squares too
    seen = view(broken(where), WORDS, TEXT, without=[(0, 1)], tokens=[3])
    for form in ("json", "html"):
        seen.save(tmp_path / f"v.{form}")
    found = json.loads((tmp_path / "v.json").read_text(), parse_constant=pytest.fail)
    assert seen.ablation is not None
    assert math.isnan(seen.ablation.divergence)
    for fields in (found, in_page(tmp_path)):
        assert fields["ablation"]["divergence"] is None
        assert fields["ablation"]["before"][0]["before"] is None


def test_heads_whose_weights_are_nan_are_named(tmp_path: Path) -> None:
    seen = view(broken("weights"), WORDS, TEXT, layers=[0, 1])
    heads = seen.layers[1].heads
    assert seen.not_numbers == tuple((1, head) for head in heads)
    seen.save(tmp_path / "v.html")
    assert in_page(tmp_path)["not_numbers"] == [[1, head] for head in heads]
    seen.save(tmp_path / "v.json")
    found = json.loads((tmp_path / "v.json").read_text(), parse_constant=pytest.fail)
    assert found["layers"][1]["weights"][0][2][:3] == [None] * 3
    assert view(families.make("llama-gqa"), WORDS, TEXT).not_numbers == ()


def test_a_divergence_is_that_of_float64_also_where_a_token_has_no_probability() -> None:
    model = families.make("llama-gqa")
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    torch.nn.init.zeros_(model.lm_head.bias).data[5] = -math.inf
    seen = view(model, WORDS, TEXT, without=[(0, 1)]).ablation
    assert seen is not None
    assert math.isfinite(seen.divergence)
    assert seen.divergence > 0


@pytest.mark.parametrize("form", ["svg", "png"])
@pytest.mark.parametrize(
    "name", ["esc\x1b[31m", "a\x00b\ufffe", "\udcff\ud800", "$x^$", "<&\u202e"]
)
def test_a_picture_holds_any_name(name: str, form: str, tmp_path: Path) -> None:
    words = Words("a", "b" if "\ud800" in name else name)
    seen = view(families.make("llama-gqa"), words, " ".join(words.words), name=name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some
        seen.save(tmp_path / f"v.{form}")
    if form == "svg":
        drawn = xml.dom.minidom.parseString((tmp_path / "v.svg").read_bytes())
        texts = [
            "".join(at.data for at in text.childNodes if at.nodeType == at.TEXT_NODE)
            for text in drawn.getElementsByTagName("text")
        ]
        codes = {"esc\x1b[31m": "escU+001B[31m", "$x^$": "$x^$", "<&\u202e": "<&U+202E"}
        assert codes.get(name, "U+") in " ".join(texts)


@pytest.mark.parametrize(
    "given",
    [
        {"model": None, "tokenizer": None, "text": "x"},
        {"model": torch.nn.Linear(2, 2)},
        {"model": "llama"},
        *({"tokenizer": each} for each in (None, 5, "x")),
        *({"text": each} for each in (None, 5, "", b"x", ["a"])),
        *({"layers": each} for each in (5, "0", [None], [0.5])),
        *({"heads": each} for each in (5, "0", ["0"])),
        *({"tokens": each} for each in (5, "it", [None], [0.5])),
        *({"generate": each} for each in (None, "2", 1.5)),
        *({"without": each} for each in (5, [5], ["0.1"], [(0,)], [(0, None)])),
    ],
)
def test_arguments_of_another_type_are_one_line(given: dict[str, Any]) -> None:
    model = families.make("llama-gqa")
    with pytest.raises(HeadwiseError) as caught:
        view(**{"model": model, "tokenizer": WORDS, "text": TEXT} | given)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_headwise")


@pytest.mark.parametrize(
    "path", [None, 5, "", "a\0.html", "~nobody-of-that-name/v.html", "/dev/null"]
)
def test_a_page_goes_into_an_ordinary_file(path: Any) -> None:
    with pytest.raises(HeadwiseError):
        view(families.make("bert"), WORDS, TEXT).save(path)
