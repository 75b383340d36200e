"""Instruments: the machine, its memory, and calls that are timed in turn."""

from headwise.measure.environment import environment
from headwise.measure.machine import Figures, Peak, measure_machine
from headwise.measure.shape import Shape, parse_shape
from headwise.measure.timing import Ratio, Timing, interleaved, ratio

__all__ = [
    "Figures",
    "Peak",
    "Ratio",
    "Shape",
    "Timing",
    "environment",
    "interleaved",
    "measure_machine",
    "parse_shape",
    "ratio",
]
