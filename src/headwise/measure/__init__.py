"""Measuring: what was timed, how, and how far to trust it."""

from headwise.measure.bench_ops import all_peers, bench_shape, judged, select_peers
from headwise.measure.environment import environment
from headwise.measure.machine import Figures, Peak, measure_machine
from headwise.measure.presets import PRESETS, Preset, select_shapes
from headwise.measure.results import LeftOut, Report, ShapeResult, Timed
from headwise.measure.shape import Shape, parse_shape
from headwise.measure.timing import Ratio, Timing, interleaved, ratio

__all__ = [
    "PRESETS",
    "Figures",
    "LeftOut",
    "Peak",
    "Preset",
    "Ratio",
    "Report",
    "Shape",
    "ShapeResult",
    "Timed",
    "Timing",
    "all_peers",
    "bench_shape",
    "environment",
    "interleaved",
    "judged",
    "measure_machine",
    "parse_shape",
    "ratio",
    "select_peers",
    "select_shapes",
]
