"""What the page computes anew is what Python's LayerView holds: scores, weights, squares, means."""

import base64
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from headwise.viewing import LayerView, page, view
from viewing.words import Words

WORDS = Words(*(f"w{index}" for index in range(29)))
# float32 in both, and exp of a score of some tens
TOLERANCE = 1e-5
FAMILIES = ["bert", "gemma2", "bloom", "gpt_oss", "mistral", "deepseek_v3"]


@cache
def seen(family: str, tokens: int, **options: Any) -> LayerView:
    text = " ".join(f"w{index * 7 % 29}" for index in range(tokens))
    return view(families.make(family), WORDS, text, layers=[1], **options).layers[0]


@pytest.fixture
def calculate(browser: Any) -> Any:
    """Runs JavaScript with the page's module of a layer, and the data of a LayerView."""
    source = (files("headwise.viewing") / "assets" / "page" / "layer.js").read_bytes()
    module = f"data:text/javascript;base64,{base64.b64encode(source).decode()}"
    context = browser.new_context()
    opened = context.new_page()

    def run(layer: LayerView, tokens: int, body: str) -> Any:
        fields = json.loads(json.dumps(page._layer(layer, tokens), allow_nan=False))
        return opened.evaluate(
            f"""async ([module, fields, total]) => {{
            const {{ Layer, meanWeights }} = await import(module);
            const layer = new Layer(fields, total);
            {body} }}""",
            [module, fields, tokens],
        )

    yield run
    context.close()


Calculate = Callable[[LayerView, int, str], Any]


def tensor(nested: Any) -> Tensor:
    """Numbers that JSON has brought from the page, where null is NaN."""
    if not isinstance(nested, list):
        return torch.tensor(torch.nan if nested is None else nested)
    return torch.stack([tensor(each) for each in nested])


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_have_the_scores_and_weights_of_the_view(calculate: Calculate, family: str) -> None:
    tokens = 11
    layer = seen(family, tokens)
    names = ("raw", "score", "weight", "lse", "content")
    found = calculate(
        layer,
        tokens,
        f"""const names = {json.dumps(names)};
        return names.map(name => fields.heads.map((_, head) => fields.rows.map((token) =>
            Array.from({{ length: total }}, (_, key) => {{
                const value = layer.pair(head, token, key)?.[name] ?? null;
                return Number.isNaN(value) ? null : value; }}))));""",
    )
    raw, score, weight, lse, content = (tensor(each) for each in found)
    hidden = layer.raw.isnan()
    assert torch.equal(raw.isnan(), hidden)
    assert torch.equal(raw[~hidden], layer.raw[~hidden])
    assert torch.allclose(score[~hidden], layer.scores[~hidden], atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.allclose(weight[~hidden], layer.weights[~hidden], atol=TOLERANCE)
    assert torch.equal(lse[~hidden], layer.lse[..., None].expand_as(lse)[~hidden])
    if layer.content is not None:
        assert torch.equal(content[~hidden], layer.content[~hidden])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_heads_is_that_of_the_views_weights(calculate: Calculate, family: str) -> None:
    tokens = 11
    layer = seen(family, tokens)
    found = calculate(
        layer,
        tokens,
        """const heads = fields.heads.map((_, head) => [layer, head]);
        return fields.rows.map(token => Array.from(meanWeights(heads, token, total),
            weight => Number.isNaN(weight) ? null : weight));""",
    )
    expected = layer.weights.mean(dim=0)
    assert torch.allclose(tensor(found).nan_to_num(0.0), expected, atol=TOLERANCE)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("family", ["bert", "mistral"])
@pytest.mark.parametrize("tokens", [11, 67])
def test_squares_are_those_of_the_view(
    calculate: Calculate, family: str, tokens: int, pooling: str
) -> None:
    """Up to 64 tokens the page makes them from the rows; above, they come pooled, in 16 bits."""
    layer = seen(family, tokens)
    found = calculate(
        layer,
        tokens,
        f"""return fields.heads.map((_, head) => {{
            const {{ side, values }} = layer.pooled(head, "{pooling}");
            return Array.from({{ length: side }}, (_, row) => Array.from(
                values.subarray(row * side, (row + 1) * side),
                weight => Number.isNaN(weight) ? null : weight)); }});""",
    )
    expected = layer.tiles_max if pooling == "max" else layer.tiles_mean
    assert expected is not None
    assert (layer.tile > 1) == (tokens > 64)
    # half a step of the 16 bits besides
    assert torch.allclose(tensor(found).nan_to_num(0.0), expected, atol=TOLERANCE + 0.5 / 65535)


def test_a_row_of_mla_has_a_content_and_a_rope_part(calculate: Calculate) -> None:
    tokens = 11
    layer = seen("deepseek_v3", tokens)
    last = tokens - 1
    content, rope = calculate(
        layer,
        tokens,
        f'return ["content", "rope"].map(part => Array.from(layer.row(2, {last}, part)));',
    )
    assert layer.content is not None
    expected = layer.content[2, last]
    assert torch.equal(tensor(content), expected)
    assert torch.allclose(tensor(rope), layer.raw[2, last] - expected, atol=TOLERANCE)
