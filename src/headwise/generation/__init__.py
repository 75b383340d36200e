"""One prompt, generated and measured; a model read step by step."""

from headwise.generation.run import Run, generate

__all__ = ["Run", "generate"]
