"""The roofline plot: every candidate is there, labelled, and no label covers another."""

import itertools
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from headwise.base.figure import write_figure
from headwise.base.plot import check_plot
from headwise.bench.results import Report, ShapeResult, Timed
from headwise.bench.roofline import draw
from headwise.errors import OptionError, UnsupportedError
from headwise.measure import Figures, Peak

BYTES, FLOPS = 64 * 2**20, 4 * 64 * 2**20


def timed(name: str, seconds: float, *, flops: int = FLOPS, threads: int = 2) -> Timed:
    return Timed(
        name=name,
        how="",
        threads=threads,
        error=0.0,
        seconds=seconds,
        low=seconds,
        high=seconds,
        ratio=None,
        bytes_per_second=BYTES / seconds,
        flops_per_second=flops / seconds,
        roofline=0.5,
    )


def result(*rows: Timed, dtype: str = "bfloat16", flops: int = FLOPS) -> ShapeResult:
    return ShapeResult(
        shape="decode:32/8:d128:16k",
        description="decode, GQA 32/8 heads, D 128, 16,384 tokens",
        dtype=dtype,
        threads=2,
        bytes=BYTES,
        flops=flops,
        rounds=4,
        tolerance=2e-2,
        cold=True,
        note="",
        timed=rows,
        left_out=(),
    )


@pytest.fixture
def report() -> Report:
    """Rows that coincide, at low and at high intensity, in two dtypes and with two threads."""
    made = Report("headwise bench ops")
    for threads in (1, 2):
        peaks = {"bfloat16": Peak(1e12, 4096), "float32": Peak(2e11, 4096)}
        made.figures.append(Figures(threads, threads * 15e9, 2**30, peaks))
    names = ("headwise", "sdpa", "sdpa-packed", "matmul", "flex", "onnxruntime")
    made.results += [
        result(*(timed(name, 0.010 + 1e-5 * at) for at, name in enumerate(names))),
        result(timed("headwise", 0.004), timed("headwise, 1 thread", 0.008, threads=1)),
        result(*(timed(name, 0.9, flops=10**11) for name in names), dtype="float32", flops=10**11),
        result(),
    ]
    return made


def test_every_candidate_is_labelled_and_no_label_covers_another(report: Report) -> None:
    figure = draw(report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = canvas.figure.bbox
    assert len(figure.axes) == 3  # of a shape of which nothing was timed there is none
    for axes, found in zip(figure.axes, report.results):
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        for row in found.timed:
            assert sum(text.startswith(f"{row.name}  ") for text in texts) == 1
        boxes = [text.get_window_extent() for text in axes.get_legend().get_texts()]
        boxes.append(axes.get_window_extent())
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert shown.x0 <= box.x0 and box.x1 <= shown.x1
            assert shown.y0 <= box.y0 and box.y1 <= shown.y1


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_plot_is_written_in_the_format_of_its_name(
    report: Report, tmp_path: Path, name: str, begin: bytes
) -> None:
    check_plot(tmp_path / name)
    write_figure(draw(report), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_another_format_and_a_missing_matplotlib_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(OptionError, match=r"ends with \.png or \.svg"):
        check_plot(Path("plot.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'headwise\[bench\]'"):
        check_plot(Path("plot.png"))
