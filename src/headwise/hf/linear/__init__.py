"""Linear attention inside Transformers: modules that run their own forward with our operators."""

from headwise.hf.linear.kinds import KINDS, Kind
from headwise.hf.linear.modules import LinearModule, linear_modules

__all__ = ["KINDS", "Kind", "LinearModule", "linear_modules"]
