"""The page in a real browser: hover, select, sort, filter, zoom, keys, export, and hostile text."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import families
from headwise.viewing import View, view
from viewing.conftest import Opened
from viewing.words import Words

SENTENCE = "the cat sat on a mat and it slept"
HOSTILE = (
    "</script><script>window.stolen=1</script>",
    '"><img/src=x/onerror=window.stolen=1>',
    "<!--",
    "\u202eabc",
    "\u05e9\u05dc\u05d5\u05dd",
    "a\u0007b",
    "\u2028",
    "&amp;",
    "{{DATA}}%%PROGRAM%%",
    "'\\\"`",
)
# Milliseconds in which the page has to have answered.
PROMPT = 100


def saved(seen: View, folder: Path) -> Path:
    path = folder / "view.html"
    seen.save(path)
    return path


@pytest.fixture(scope="module")
def gqa() -> View:
    model = families.make("llama-gqa")
    return view(model, Words(*dict.fromkeys(SENTENCE.split())), SENTENCE, name="small GQA")


@pytest.fixture(scope="module")
def gqa_page(gqa: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(gqa, tmp_path_factory.mktemp("gqa"))


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 tokens in 4 layers of 8 heads; three rows in full."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=None,
    )
    words = Words(*(f"w{at}" for at in range(96)))
    text = " ".join(f"w{at * 7 % 96}" for at in range(2000))
    seen = view(transformers.LlamaForCausalLM(config).eval(), words, text, tokens=[5, 1000, 1999])
    return saved(seen, tmp_path_factory.mktemp("long"))


def weight(page: Any) -> float:
    return float(page.inner_text("#pair-numbers dd.big"))


def frame(page: Any) -> None:
    """Until what was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")


def test_hovering_a_token_shows_where_it_attends(opened: Opened, gqa_page: Path, gqa: View) -> None:
    page = opened.go(gqa_page, "#head=1.4&token=8")
    page.hover("#t6")
    frame(page)
    row = gqa.layers[1].weights[4, 6]
    best = int(row.argmax())
    assert page.inner_text("#says b") == "and"
    assert page.inner_text("#top li:first-child span").strip() == gqa.tokens[best].text.strip()
    assert weight(page) == pytest.approx(float(row[best]), abs=1.1e-5)
    page.mouse.move(5, 5)
    frame(page)
    assert page.inner_text("#says b") == "slept"


def test_selecting_a_token_keeps_it(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    page.click("#t3")
    page.mouse.move(5, 5)
    frame(page)
    assert page.inner_text("#says b") == "on"
    assert page.get_attribute("#t3", "aria-selected") == "true"
    assert page.get_attribute("#strip", "aria-activedescendant") == "t3"


def test_every_pair_has_the_weight_and_scores_of_the_view(
    opened: Opened, gqa_page: Path, gqa: View
) -> None:
    page = opened.go(gqa_page)
    layer = gqa.layers[2]
    for token, key in ((8, 0), (8, 8), (4, 2)):
        page.goto("about:blank")
        page.goto(f"{gqa_page.as_uri()}#head=2.5&token={token}&key={key}")
        numbers = [
            float(text.replace("\u2212", "-"))
            for text in page.locator("#pair-numbers dd").all_inner_texts()
        ]
        expected = [
            float(layer.weights[5, token, key]),
            float(layer.raw[5, token, key]),
            float(layer.scores[5, token, key]),
            float(layer.lse[5, token]),
        ]
        assert numbers == pytest.approx(expected, abs=6e-4)
        assert numbers[0] == pytest.approx(expected[0], abs=1e-5)


def test_a_masked_pair_says_so(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page, "#token=2&key=7")
    assert "later token" in page.inner_text("#pair-numbers")


@pytest.mark.parametrize("scope", ["layer", "all"])
def test_weights_are_averaged_over_a_layer_or_all_heads(
    opened: Opened, gqa_page: Path, gqa: View, scope: str
) -> None:
    page = opened.go(gqa_page, "#head=1.0&token=8&key=5")
    page.click(f"[data-scope={scope}]")
    stacked = torch.stack([layer.weights for layer in gqa.layers])
    expected = stacked[1].mean(0)[8, 5] if scope == "layer" else stacked.mean((0, 1))[8, 5]
    shown = page.locator("#pair-numbers dd").last.inner_text()
    assert float(shown) == pytest.approx(float(expected), abs=1.1e-5)


def test_heads_sort_by_a_figure_in_table_and_overview(
    opened: Opened, gqa_page: Path, gqa: View
) -> None:
    page = opened.go(gqa_page)
    entropy = {
        f"{layer.index}.{head}": float(layer.statistics[at, 0])
        for layer in gqa.layers
        for at, head in enumerate(layer.heads)
    }
    page.click("th[data-column=entropy] button")
    names = page.locator("#table tbody td:first-child").all_inner_texts()
    assert names == sorted(entropy, key=entropy.__getitem__, reverse=True)
    assert page.get_attribute("th[data-column=entropy]", "aria-sort") == "descending"
    first = page.locator("#grid .head").first.inner_text()
    assert first.startswith(names[0])
    page.click("th[data-column=entropy] button")
    assert page.locator("#table tbody td:first-child").all_inner_texts() == names[::-1]


def test_heads_filter_by_a_figure(opened: Opened, gqa_page: Path, gqa: View) -> None:
    page = opened.go(gqa_page)
    first = [float(value) for layer in gqa.layers for value in layer.statistics[:, 2]]
    page.select_option("#filter-by", "first")
    page.fill("#filter-value", "25")
    passing = sum(value >= 0.25 for value in first)
    assert 0 < passing < 18
    assert page.inner_text("#filter-count") == f"{passing} of 18 heads"
    assert page.locator("#table tbody tr").count() == passing
    assert page.locator("#grid .head.out").count() == 18 - passing


def test_heads_that_share_a_kv_head_stand_together(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    assert page.locator("#grid .row").count() == 3
    assert page.locator("#grid .group").count() == 6
    assert page.locator("#grid .group").first.locator(".head").count() == 3
    assert "6 query heads share 2 kv heads" in page.inner_text("#mechanism")


def test_a_click_on_a_thumbnail_takes_that_head(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    page.click("#grid .head[data-head='2.3']")
    assert page.inner_text("#matrix-title") == "Head 2.3"
    assert page.get_attribute("#grid .head[data-head='2.3']", "aria-pressed") == "true"


def test_a_click_in_the_matrix_takes_the_pair(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    box = page.locator("#matrix").bounding_box()
    side = box["height"] - box["width"] * 0.0
    page.mouse.click(box["x"] + box["width"] - 200, box["y"] + side - 20)
    assert page.evaluate("location.hash").startswith("#token=8&")
    assert "&key=" in page.evaluate("location.hash")


def test_keys_move_between_tokens_layers_and_heads(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    page.focus("#strip")
    page.keyboard.press("Home")
    assert page.inner_text("#says b") == "the"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#says b") == "sat"
    page.keyboard.press("Shift+ArrowLeft")
    assert "&key=" in page.evaluate("location.hash")
    page.keyboard.press("Escape")
    assert "&key=" not in page.evaluate("location.hash")
    page.keyboard.press("]")
    page.keyboard.press(".")
    assert page.inner_text("#matrix-title") == "Head 1.1"
    page.focus("[data-scope=head]")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("[data-scope=layer]", "aria-checked") == "true"


def test_everything_that_can_be_operated_has_a_name(opened: Opened, gqa_page: Path) -> None:
    page = opened.go(gqa_page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas, [role]")]
        .filter(each => each.checkVisibility() && each.getAttribute("aria-hidden") !== "true"
          && !each.closest("[aria-hidden=true], .head, svg") && each.id !== "scale")
        .filter(each => !(each.getAttribute("aria-label") || each.getAttribute("aria-labelledby")
          || each.textContent.trim() || each.closest("label") || each.role === "presentation"
          || each.role === "status"))
        .map(each => each.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(opened: Opened, gqa_page: Path, theme: str) -> None:
    page = opened.go(gqa_page, f"#theme={theme}")
    ratio = page.evaluate(
        """() => {
        const light = text => { const c = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
        const under = at => { for (let e = at; e; e = e.parentElement) {
          const c = getComputedStyle(e).backgroundColor;
          if (c !== "rgba(0, 0, 0, 0)") return c; } };
        let worst = [99, ""];
        for (const e of document.querySelectorAll(".token, .note, h1, h2, dt, dd, td, th button, "
            + "label, .facts, .top i, .legend span, footer p, .segments button")) {
          if (!e.checkVisibility() || !e.textContent.trim()) continue;
          const a = light(getComputedStyle(e).color), b = light(under(e));
          const r = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (r < worst[0]) worst = [r, e.outerHTML.slice(0, 90)];
        }
        return worst; }"""
    )
    assert ratio[0] >= 4.5, ratio


def test_it_starts_in_the_theme_of_the_reader_and_can_be_switched(
    browser: Any, gqa_page: Path
) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(gqa_page.as_uri())
    assert page.get_attribute("html", "data-theme") == "dark"
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "light"
    context.close()


def test_a_phone_shows_it_without_scrolling_sideways(opened: Opened, gqa_page: Path) -> None:
    opened.page.set_viewport_size({"width": 400, "height": 800})
    page = opened.go(gqa_page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator("#matrix").bounding_box()["width"] > 300


@pytest.mark.parametrize(
    ("form", "begins"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("json", b"{")]
)
def test_it_exports(
    opened: Opened, gqa_page: Path, gqa: View, tmp_path: Path, form: str, begins: bytes
) -> None:
    page = opened.go(gqa_page, "#head=1.4&token=6")
    with page.expect_download() as waiting:
        page.click(f"#export-{form}")
    waiting.value.save_as(tmp_path / "out")
    content = (tmp_path / "out").read_bytes()
    assert waiting.value.suggested_filename == f"attention-1.4.{form}"
    assert content.startswith(begins)
    if form == "svg":
        with page.expect_download() as waiting:
            page.click("#export-png")
        waiting.value.save_as(tmp_path / "png")
        inside = re.search(rb'href="data:image/png;base64,([^"]+)"', content)
        assert inside is not None
        assert base64.b64decode(inside[1]) == (tmp_path / "png").read_bytes()
    if form == "json":
        given = [each["weight"] for each in json.loads(content)["attends_to"]]
        expected = gqa.layers[1].weights[4, 6].tolist()
        assert [0.0 if each is None else each for each in given] == pytest.approx(
            expected, abs=1e-5
        )


def test_an_mla_page_shows_latent_content_and_rope(opened: Opened, tmp_path: Path) -> None:
    model = families.make("deepseek_v3")
    seen = view(model, Words(*dict.fromkeys(SENTENCE.split())), SENTENCE)
    page = opened.go(saved(seen, tmp_path), "#head=1.2&token=8&key=3")
    assert "one cached latent of 20" in page.inner_text("#mechanism")
    assert page.locator("#grid .group.latent").count() == 3
    content, rope = (
        float(text.replace("\u2212", "-"))
        for text in page.locator("#pair-parts .meter span:last-child").all_inner_texts()
    )
    assert content == pytest.approx(float(seen.layers[1].content[2, 8, 3]), abs=6e-4)
    assert content + rope == pytest.approx(float(seen.layers[1].raw[2, 8, 3]), abs=1.1e-3)
    page.click("[data-part=rope]")
    frame(page)
    assert "Scores" in page.get_attribute("#matrix", "aria-label")


def test_tokens_that_were_decoded_are_marked_and_the_next_is_named(
    opened: Opened, tmp_path: Path
) -> None:
    words = Words(*dict.fromkeys(SENTENCE.split()))
    seen = view(families.make("llama-gqa"), words, "the cat sat", generate=4)
    page = opened.go(saved(seen, tmp_path))
    assert page.locator(".token.new").count() == 4
    assert page.inner_text(".follows b") == seen.following.text.strip()


def test_text_is_text_whatever_it_says(opened: Opened, tmp_path: Path) -> None:
    seen = view(families.make("llama-gqa"), Words(*HOSTILE), " ".join(HOSTILE), name=HOSTILE[0])
    page = opened.go(saved(seen, tmp_path))
    assert page.evaluate("window.stolen") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.inner_text("h1") == HOSTILE[0]
    shown = [page.inner_text(f"#t{at}") for at in range(len(HOSTILE))]
    assert shown[0] == HOSTILE[0]
    assert shown[1] == HOSTILE[1]
    assert shown[3] == "U+202Eabc"
    assert shown[4] == HOSTILE[4]
    assert shown[5] == "aU+0007b"
    assert shown[6] == "U+2028"
    assert shown[8] == HOSTILE[8]
    assert shown[9] == HOSTILE[9]


def test_the_page_without_its_data_is_small(gqa: View) -> None:
    content = gqa.html()
    start = content.index('id="data">')
    assert len(content.encode()) - len(content[start : content.index("</script>", start)]) < 400_000


def answered(page: Any, action: str) -> float:
    """Milliseconds from an event to the end of the frame that draws what it asked for."""
    return page.evaluate(
        f"""async () => {{
        const begun = performance.now();
        {action}
        await new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
        return performance.now() - begun; }}"""
    )


@pytest.mark.parametrize(
    "action",
    [
        "document.getElementById('t1000').dispatchEvent("
        "new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));",
        "document.getElementById('t300').dispatchEvent("
        "new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));",
        "document.getElementById('t1999').click();",
        "document.querySelector('[data-scope=all]').click();",
        "document.querySelectorAll('#grid .head')[9].click();",
        "document.getElementById('zoom-row').click();",
        "document.querySelector('th[data-column=pair] button').click();",
    ],
    ids=["hover a query", "hover a key", "select", "average all", "head", "zoom", "sort"],
)
@pytest.mark.sweep  # it is timed, and a busy machine is no fault of the page
def test_a_page_of_2000_tokens_answers_at_once(
    opened: Opened, long_page: Path, action: str
) -> None:
    page = opened.go(long_page)
    frame(page)
    # the least of three: the machine may be busy with something else
    assert min(answered(page, action) for _ in range(3)) < PROMPT


def test_a_square_ends_where_a_token_sees_no_more_keys(opened: Opened, long_page: Path) -> None:
    page = opened.go(long_page, "#token=1000&key=700")
    colours = """(places) => {
        const canvas = document.getElementById("matrix"), ratio = window.devicePixelRatio || 1;
        const left = 44, size = Math.min(canvas.clientWidth - 48, 620);
        const { width, height } = canvas;
        const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        const pixel = (x, y) => [...data.subarray(4 * (y * width + x), 4 * (y * width + x) + 3)];
        return places.map(([row, column]) => {
            const x = Math.round((left + (size * column) / 2000) * ratio);
            const y = Math.round((24 + (size * row) / 2000) * ratio);
            return Array.from({ length: 64 }, (_, at) => pixel(x + (at % 8), y + (at >> 3)));
        });
    }"""
    frame(page)
    # a square is 32 tokens wide: one begins at 1600 and would reach to 1632
    places = [[100, 1900], [1601, 1630], [1660, 1500]]
    empty, above, below = page.evaluate(colours, places)
    assert above[0] == empty[0]
    assert empty[0] in below  # the hatching
    assert len({tuple(each) for each in below}) > 1


def test_zoom_goes_down_to_single_tokens_of_the_chosen_rows(
    opened: Opened, long_page: Path
) -> None:
    page = opened.go(long_page, "#token=1000&key=700")
    assert page.inner_text("#window") == (
        "All 2000 tokens; 3 rows in full, "
        "the others in hatched squares of 32 by 32: the largest weight in each"
    )
    page.click("#zoom-row")
    assert page.inner_text("#window").startswith("Columns 688 to 711 of 2000")
    page.focus("#matrix")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#window").startswith("Columns 691 to 714 of 2000")
    page.keyboard.press("0")
    assert page.inner_text("#window").startswith("All 2000")
    box = page.locator("#matrix").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -300)
    frame(page)
    assert page.inner_text("#window").startswith("Columns")


def test_tokens_whose_weights_were_not_kept_can_only_be_attended_to(
    opened: Opened, long_page: Path
) -> None:
    page = opened.go(long_page, "#token=1999")
    assert page.get_attribute("#t300", "aria-disabled") == "true"
    page.click("#t300", force=True)  # Playwright waits for what is disabled
    assert page.evaluate("location.hash").startswith("#token=1999&")
    assert page.evaluate("location.hash").endswith("&key=300")
    assert not math.isnan(weight(page))
    page.focus("#strip")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("location.hash").startswith("#token=1000&")


@pytest.mark.parametrize("family", ["bert", "gemma2", "bloom", "gpt_oss", "mistral", "deepseek_v2"])
def test_the_page_computes_the_weights_of_every_kind_of_score(
    opened: Opened, tmp_path: Path, family: str
) -> None:
    """Caps, biases, sinks, windows and latents: what the page shows is what the view holds."""
    seen = view(families.make(family), Words(*dict.fromkeys(SENTENCE.split())), SENTENCE)
    page = opened.go(saved(seen, tmp_path), "#head=2.5&token=8")
    with page.expect_download() as waiting:
        page.click("#export-json")
    waiting.value.save_as(tmp_path / "out.json")
    given = json.loads((tmp_path / "out.json").read_text())["attends_to"]
    assert [each["weight"] or 0.0 for each in given] == pytest.approx(
        seen.layers[2].weights[5, 8].tolist(), abs=1e-5
    )


def test_a_page_without_an_overview_shows_the_rows_that_there_are(
    opened: Opened, tmp_path: Path
) -> None:
    words = Words(*dict.fromkeys(SENTENCE.split()))
    seen = view(families.make("llama-gqa"), words, SENTENCE, tokens=[3, "it"], overview=False)
    page = opened.go(saved(seen, tmp_path))
    assert page.inner_text("#heads-note") == "Means over 2 tokens"
    # they are drawn as they come into view
    page.wait_for_function("document.querySelectorAll('#grid canvas[data-done]').length === 18")
    page.focus("#strip")
    page.keyboard.press("Home")
    assert page.inner_text("#says b") == "on"


def test_a_notebooks_frame_shows_the_page(opened: Opened, gqa: View, tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(f"<body>{gqa._repr_html_()}</body>", encoding="utf-8")
    page = opened.go(tmp_path / "notebook.html")
    inside = page.frame_locator("iframe")
    assert inside.locator("h1").inner_text() == "small GQA"
    inside.locator("#t4").click()
    assert inside.locator("#t4").get_attribute("aria-selected") == "true"
