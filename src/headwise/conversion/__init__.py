"""`convert`: move a checkpoint to a cheaper attention mechanism, with a verdict."""

from headwise.conversion.quality import Quality
from headwise.conversion.run import convert
from headwise.conversion.speed import DecodeSpeed, Speeds
from headwise.conversion.target import Target
from headwise.conversion.verdict import CacheCost, Verdict

__all__ = ["CacheCost", "DecodeSpeed", "Quality", "Speeds", "Target", "Verdict", "convert"]
