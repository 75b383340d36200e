"""One prompt, generated and measured; a model read step by step."""

from headwise.generation.answer import Answer
from headwise.generation.recorder import generate

__all__ = ["Answer", "generate"]
