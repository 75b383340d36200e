"""Measuring: what was timed, how, and how far to trust it."""

from headwise.measure.timing import Ratio, Timing, interleaved, ratio

__all__ = ["Ratio", "Timing", "interleaved", "ratio"]
