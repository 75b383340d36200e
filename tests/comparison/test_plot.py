"""The figure: every mechanism is there and named, and the same results make the same file."""

from pathlib import Path

import pytest

from headwise.base.figure import write_figure
from headwise.comparison import Comparison, Configuration, Run, Speed
from headwise.comparison.plot import draw
from headwise.comparison.speed import DecodeRate, Rate

NAMES = ("mha", "gqa:4", "gqa:2", "mqa", "mla", "mla:16")
BYTES = (1024, 512, 256, 128, 288, 160)


@pytest.fixture
def found() -> Comparison:
    made = Comparison(Configuration(mechanisms=NAMES, seeds=2), "accuracy", 1 / 32)
    for at, (name, size) in enumerate(zip(NAMES, BYTES)):
        made.runs += [Run(name, seed, 1.0, 0.9 - 0.1 * at - 0.05 * seed, ()) for seed in (0, 1)]
        rate = Rate(1000 - size / 10, 900 - size / 10, 1100 - size / 10)
        decode = tuple(DecodeRate(context, rate) for context in (1024, 8192))
        made.speeds.append(Speed(name, size, 0.0, rate, decode, None))
    return made


def test_every_mechanism_is_drawn_named_and_told_apart_without_colour(found: Comparison) -> None:
    quality, decoding = draw(found).axes
    assert [text.get_text() for text in quality.texts[:-1]] == list(NAMES)
    lines = [line for line in decoding.get_lines() if line.get_label() in NAMES]
    assert len({line.get_marker() for line in lines}) == len(NAMES)
    assert len({line.get_color() for line in lines}) == len(NAMES)


def test_no_name_covers_another(found: Comparison) -> None:
    figure = draw(found)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:at])


def test_the_same_results_make_the_same_file(found: Comparison, tmp_path: Path) -> None:
    write_figure(draw(found), tmp_path / "1.svg")
    write_figure(draw(found), tmp_path / "2.svg")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    write_figure(draw(found), tmp_path / "3.png")
    assert (tmp_path / "3.png").read_bytes().startswith(b"\x89PNG")
