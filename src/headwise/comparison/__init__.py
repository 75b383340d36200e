"""Comparing mechanisms: small decoders that differ in the attention alone, trained and timed."""

from headwise.comparison.configuration import Configuration
from headwise.comparison.experiment import Experiment, compare
from headwise.comparison.results import Comparison
from headwise.comparison.speed import Speed
from headwise.comparison.training import Run
from headwise.comparison.verdict import pairs

__all__ = [
    "Comparison",
    "Configuration",
    "Experiment",
    "Run",
    "Speed",
    "compare",
    "pairs",
]
