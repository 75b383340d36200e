"""One prompt, generated and measured: prefill in chunks, decode token by token."""

from headwise.generation.run import Run, generate

__all__ = ["Run", "generate"]
