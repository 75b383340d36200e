"""Comparing mechanisms: small decoders that differ in the attention alone, trained and timed."""

from headwise.comparison.configuration import Configuration
from headwise.comparison.experiment import Experiment, compare
from headwise.comparison.results import Comparison
from headwise.comparison.speed import DecodeRate, Rate, Speed
from headwise.comparison.training import Point, Run
from headwise.comparison.verdict import Pair, SeedScores, pairs

__all__ = [
    "Comparison",
    "Configuration",
    "DecodeRate",
    "Experiment",
    "SeedScores",
    "Pair",
    "Point",
    "Rate",
    "Run",
    "Speed",
    "compare",
    "pairs",
]
