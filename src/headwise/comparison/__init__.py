"""Comparing mechanisms: small decoders that differ in the attention alone, trained and timed."""

from headwise.comparison.configuration import Configuration
from headwise.comparison.results import Comparison
from headwise.comparison.run import Work, compare
from headwise.comparison.speed import DecodeRate, Rate, Speed
from headwise.comparison.train import Point, Run
from headwise.comparison.verdict import Pair, Quality, pairs

__all__ = [
    "Comparison",
    "Configuration",
    "DecodeRate",
    "Pair",
    "Point",
    "Quality",
    "Rate",
    "Run",
    "Speed",
    "Work",
    "compare",
    "pairs",
]
