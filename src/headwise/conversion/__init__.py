"""`convert`: move a checkpoint to a cheaper attention mechanism, with a verdict."""

from headwise.conversion.pipeline import convert
from headwise.conversion.target import Target
from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.speed import DecodeSpeed, Speeds
from headwise.conversion.verdict.verdict import CacheCost, Verdict

__all__ = ["CacheCost", "DecodeSpeed", "Quality", "Speeds", "Target", "Verdict", "convert"]
